"""Tests of the whole house: the contract, the import rule, end to end."""
