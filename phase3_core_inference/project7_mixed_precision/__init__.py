"""Project 7: training and inference in fewer bits than 32."""
