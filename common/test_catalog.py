"""The phone book: names, arguments, recipes; every entry leads somewhere."""

import importlib.util
import json
import sys
import types

import pytest
import torch
from torch import nn

from common import catalog


def widen(model, times=2, kind="plain"):
    """A transform that returns another model."""
    new = nn.Linear(model.in_features, model.out_features * times)
    new.kind = kind
    return new


def freeze(model):
    """A transform in place."""
    return model.requires_grad_(False)


def typed(model, every: int = 1, rate: float | None = None, names: list[str] = (), kind: object = None):
    """A transform that says what it takes."""
    return model


def broken(model):
    """A transform with a bug of its own."""
    return model + None


@pytest.fixture
def entries(monkeypatch):
    """Entries of our own; they replace the real ones for one test."""
    module = types.ModuleType("entries_of_a_test")
    module.widen, module.freeze, module.broken, module.typed = widen, freeze, broken, typed
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = {name: f"{module.__name__}:{name}" for name in ("widen", "broken", "typed")}
    monkeypatch.setitem(catalog.GROUPS, "transforms", names)
    monkeypatch.setitem(catalog.GROUPS, "runtime", {"freeze": f"{module.__name__}:freeze"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flash", ("flash", {})),
        ("int4:group_size=64", ("int4", {"group_size": 64})),
        ("int4:group_size=64,method=gptq", ("int4", {"group_size": 64, "method": "gptq"})),
        ("lora:rank=8,alpha=1.5,dora=true", ("lora", {"rank": 8, "alpha": 1.5, "dora": True})),
        ("lora:dora=False,targets=None", ("lora", {"dora": False, "targets": None})),
        ('lora:targets=["q_proj","v_proj"],rank=8', ("lora", {"targets": ["q_proj", "v_proj"], "rank": 8})),
        ('x:name="3"', ("x", {"name": "3"})),
        ("x:path=a/b:c", ("x", {"path": "a/b:c"})),
        ("x:empty=", ("x", {"empty": ""})),
        ("x:", ("x", {})),
    ],
)
def test_parse(text, expected):
    assert catalog.parse(text) == expected


@pytest.mark.parametrize("text", ["int4:64", "int4:group size=64", "int4:=3"])
def test_parse_refuses_what_it_cannot_read(text):
    with pytest.raises(ValueError, match=r"write options as name:key=value,key=value"):
        catalog.parse(text)


def test_unknown_names_list_the_known_ones(entries):
    with pytest.raises(ValueError, match="unknown catalog group 'ghosts': the groups are transforms, runtime"):
        catalog.resolve("ghosts", "paged")
    with pytest.raises(ValueError, match="unknown name 'flash' in the catalog group 'runtime': known are freeze"):
        catalog.resolve("runtime", "flash")
    with pytest.raises(ValueError, match="unknown transform 'flash': known are broken, freeze, typed, widen"):
        catalog.apply(nn.Linear(2, 2), ["flash"])


def test_apply_records_what_lasts(entries):
    model = catalog.apply(nn.Linear(2, 3), ["widen:times=2", "freeze", "widen:times=5,kind=odd"])
    assert model.out_features == 30
    assert model.recipe == [["widen", {"times": 2}], ["widen", {"times": 5, "kind": "odd"}]]
    assert not any(p.requires_grad for p in catalog.apply(nn.Linear(2, 2), ["freeze"]).parameters())


def test_a_recipe_can_be_replayed_after_json(entries):
    recipe = catalog.apply(nn.Linear(2, 3), ["widen:times=3", "widen:times=2"]).recipe
    with torch.device("meta"):
        again = catalog.apply(nn.Linear(2, 3), json.loads(json.dumps(recipe)))
    assert again.out_features == 18
    assert again.weight.is_meta
    assert again.recipe == recipe


def test_nothing_to_apply_changes_nothing():
    model = nn.Linear(2, 2)
    assert catalog.apply(model, []) is model


def test_wrong_options_are_the_users_and_bugs_are_ours(entries):
    with pytest.raises(ValueError, match=r"widen does not take the options \{'factor': 2\}.*times=2, kind='plain'"):
        catalog.apply(nn.Linear(2, 2), ["widen:factor=2"])
    with pytest.raises(TypeError):
        catalog.apply(nn.Linear(2, 2), ["broken"])


@pytest.mark.parametrize("option", ["every=abc", "every=1.5", "every=true", "every=null", "rate=fast", "names=q_proj"])
def test_options_of_a_wrong_type_are_named(entries, option):
    key, value = option.split("=")
    shown = {"true": "True", "null": "None", "1.5": "1.5"}.get(value, repr(value))
    with pytest.raises(ValueError, match=rf"typed does not take {key}={shown}: it has .*every: int = 1, rate: float"):
        catalog.apply(nn.Linear(2, 2), [f"typed:{option}"])


def test_options_of_the_right_type_pass(entries):
    for options in ("every=2", "rate=3", "rate=0.5", "rate=null", 'names=["q_proj"]', "kind=3", "kind=odd"):
        catalog.apply(nn.Linear(2, 2), [f"typed:{options}"])
    catalog.apply(nn.Linear(2, 2), ["widen:times=2,kind=3"])  # no annotation, no check


ENTRIES = [(group, name) for group, names in catalog.GROUPS.items() for name in names]


@pytest.mark.parametrize(("group", "name"), ENTRIES)
def test_every_entry_leads_to_a_function(group, name):
    module = catalog.GROUPS[group][name].split(":")[0]
    assert importlib.util.find_spec(module), f"{group} {name}: there is no {module}"
    assert callable(catalog.resolve(group, name))


if __name__ == "__main__":
    for use in ("flash", "int4:group_size=64,method=gptq"):
        print(f"{use!r} -> {catalog.parse(use)}")
    raise SystemExit(pytest.main([__file__]))
