"""CUDA graphs: record the launches of a function once, replay them at the cost of one."""

import torch


def capture(function, *example, warmup=3):
    """Record `function` on a GPU and return a replayer with the same signature.

    The function must be capturable: tensors of fixed shapes, no synchronisation, no host-side decisions. Arguments of
    a call are copied into the buffers that were recorded; the result is a buffer that the next call overwrites.

    Args:
        function: takes tensors, returns a tensor or a tuple of tensors.
        example: tensors with the shapes, types and device of all later calls.
        warmup: eager calls before the recording, so that lazy initialisation and autotuning are over.

    Returns:
        A function of the same arguments. On a device without CUDA graphs this is `function` itself.
    """
    if not torch.cuda.is_available() or not all(tensor.is_cuda for tensor in example):
        return function
    buffers = [tensor.clone() for tensor in example]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            function(*buffers)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*buffers)

    def replay(*arguments):
        for buffer, argument in zip(buffers, arguments, strict=True):
            if buffer.shape != argument.shape:
                raise ValueError(f"the graph was captured for shape {tuple(buffer.shape)}, not {tuple(argument.shape)}")
            buffer.copy_(argument)
        graph.replay()
        return result

    return replay
