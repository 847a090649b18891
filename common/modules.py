"""Layers are swapped, once: the only way in which any project replaces modules of a model."""


def swap_modules(model, make, match, skip=()):
    """Replace every matching module of `model` in place.

    LoRA, quantization, pruning, fusion and tensor parallelism all come through here. A match is by attributes, not
    by class, so that one technique can stand on top of another (LoRA on int4)::

        swap_modules(model, lambda name, old: Int8Linear(old), is_linear, skip=("head",))

    Args:
        model: any module; a module that stands in it twice (shared blocks) is made once and put in both places.
        make: ``make(name, old) -> new``.
        match: ``match(name, module) -> bool``, or a class.
        skip: names to leave alone: whole dotted names or their last parts.

    Returns:
        (swapped, candidates): how many were replaced, of how many that matched before `skip` was applied.

    Raises:
        ValueError: nothing matched.
    """
    wanted = match if not isinstance(match, type) else lambda name, module: isinstance(module, match)
    places = [
        (name, parent, child_name, child)
        for parent_name, parent in list(model.named_modules(remove_duplicate=True))
        for child_name, child in parent._modules.items()  # named_children() would list a shared block once
        if child is not None and wanted(name := f"{parent_name}.{child_name}".lstrip("."), child)
    ]
    if not places:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(
            f"no module of {type(model).__name__} matched, so nothing was swapped; it has {', '.join(kinds)}"
        )
    made, swapped = {}, 0
    for name, parent, child_name, child in places:
        if name in skip or child_name in skip:
            continue
        if id(child) not in made:
            made[id(child)] = make(name, child)
        setattr(parent, child_name, made[id(child)])
        swapped += 1
    return swapped, len(places)


def is_linear(name, module):
    """True for whatever behaves like a linear layer: it has `in_features` and `out_features`."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")
