"""Layers are swapped, once: the only way in which any project replaces modules of a model."""


def swap_modules(model, make, match, skip=()):
    """Replace every matching module of `model` in place.

    LoRA, quantization, pruning, fusion and tensor parallelism all come through here. A match is by attributes, not
    by class, so that one technique can stand on top of another (LoRA on int4)::

        swap_modules(model, lambda name, old: Int8Linear(old), is_linear, skip=("head",))

    Args:
        model: any module; a module that stands in it twice (shared blocks) is made once and put in both places. What
            is inside a module that matched is left alone (the int4 layer inside a LoRA layer, say).
        make: ``make(name, old) -> new``.
        match: ``match(name, module) -> bool``, or a class.
        skip: names to leave alone with all that is inside them: dotted names from the root, or single parts of one
            (``"head"``, ``"blocks.0"``, ``"mlp"``).

    Returns:
        (swapped, candidates): how many were replaced, of how many that matched before `skip` was applied.

    Raises:
        ValueError: nothing matched.
    """
    wanted = match if not isinstance(match, type) else lambda name, module: isinstance(module, match)
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    places = list(_places(model, "", wanted, set()))
    if not places:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(
            f"no module of {type(model).__name__} matched, so nothing was swapped; it has {', '.join(kinds)}"
        )
    made, swapped = {}, 0
    for name, parent, child_name, child in places:
        parts = name.split(".")
        if any(part in skip or ".".join(parts[: i + 1]) in skip for i, part in enumerate(parts)):
            continue
        if id(child) not in made:
            made[id(child)] = make(name, child)
            made[id(child)].train(child.training)
        setattr(parent, child_name, made[id(child)])
        swapped += 1
    return swapped, len(places)


def _places(parent, prefix, wanted, walked):
    """(name, parent, child's name, child) of every outermost match; a shared parent is walked through once."""
    if id(parent) in walked:
        return
    walked.add(id(parent))
    for child_name, child in parent._modules.items():  # named_children() would list a shared child once
        name = f"{prefix}{child_name}"
        if child is not None and wanted(name, child):
            yield name, parent, child_name, child
        elif child is not None:
            yield from _places(child, f"{name}.", wanted, walked)


def is_linear(name, module):
    """True for whatever behaves like a linear layer: it has `in_features` and `out_features`."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")
