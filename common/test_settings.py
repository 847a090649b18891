"""Settings: from constants to flags and back, and what happens when the user mistypes."""

import copy
import importlib.util
import json
import pickle
from pathlib import Path

import pytest

from common import settings

CONFIG = '''
"""A config as the projects write them."""
import os
from pathlib import Path

from common import DATA, ROOT  # imported: no flags

# == Model ==
N_LAYER = 6  # number of blocks
N_EMBD: int = 384  # width, 100% of it
DROPOUT = 0.0  # share of dropped units

# a remark on a line of its own, which is no help text
TIE_HEAD = True  # one matrix for embedding and head
TOP_K: int | None = None  # keep the k most likely
BETAS = (0.9, 0.95)  # Adam's decay rates
LAYERS = [  # which layers
    1,  # the first
    2,
]
NAMES: list[str] = [
    # nothing yet
]  # transforms by name
ROPE: dict | None = None  # scaling of the positions
KEPT: list[int] | None = [0]  # layers that are kept; none: all
# == System ==
SEED = 1337  # of all randomness
OUT = Path("a") / "b"  # where to
TRAIN_DATA_PATH = os.path.join("data", "x.txt")  # text
if N_LAYER > 3:
    BATCH = 64  # sequences
else:
    BATCH = 8
lower = 3  # no constant
_HIDDEN = 4  # no constant


def validate_config(settings=None):
    """Refuse what cannot work."""
    SEED = 5  # a local name, no constant
    if settings.N_EMBD % settings.N_LAYER:
        raise ValueError(f"N_EMBD={settings.N_EMBD} must be divisible by N_LAYER={settings.N_LAYER}: use 384")
'''


def make_config(folder, source, name="config_under_test"):
    path = Path(folder) / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path, CONFIG.lstrip())


def test_defaults_come_from_the_module(config):
    s = settings.load(config, [])
    assert (s.N_LAYER, s.N_EMBD, s.TIE_HEAD, s.TOP_K, s.BETAS, s.LAYERS) == (6, 384, True, None, (0.9, 0.95), [1, 2])
    assert s.overrides == set()
    assert s.BATCH == 64


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--n_embd", "96"], "N_EMBD", 96),
        (["--n-embd", "96"], "N_EMBD", 96),
        (["--n_embd=9_6"], "N_EMBD", 96),
        (["--seed", "1e6"], "SEED", 1_000_000),
        (["--seed", "-1"], "SEED", -1),
        (["--dropout", "1"], "DROPOUT", 1.0),
        (["--tie_head"], "TIE_HEAD", True),
        (["--no_tie_head"], "TIE_HEAD", False),
        (["--no-tie-head"], "TIE_HEAD", False),
        (["--top_k", "50"], "TOP_K", 50),
        (["--top_k", "none"], "TOP_K", None),
        (["--betas", "0.8", "0.99"], "BETAS", (0.8, 0.99)),
        (["--layers", "3", "4", "5"], "LAYERS", [3, 4, 5]),
        (["--layers"], "LAYERS", []),
        (["--kept", "none"], "KEPT", None),
        (["--kept", "1", "2"], "KEPT", [1, 2]),
        (["--kept"], "KEPT", []),
        (["--names", "flash", "int4:group_size=64"], "NAMES", ["flash", "int4:group_size=64"]),
        (["--rope", '{"factor": 2.0}'], "ROPE", {"factor": 2.0}),
        (["--out", "c/d"], "OUT", Path("c/d")),
        (["--train_data_path", "y.txt"], "TRAIN_DATA_PATH", "y.txt"),
        (["--batch", "2"], "BATCH", 2),
    ],
)
def test_a_flag_overrides_with_the_type_of_the_constant(config, argv, name, value):
    s = settings.load(config, argv)
    assert getattr(s, name) == value
    assert type(getattr(s, name)) is type(value)
    assert s.overrides == {name}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n_embd", "wide"], "argument --n_embd/--n-embd: invalid int value: 'wide'"),
        (["--n_embd", "1.5"], "invalid int value: '1.5'"),
        (["--n_embd", "1e400"], "invalid int value: '1e400'"),
        (["--dropout", "lots"], "invalid float value: 'lots'"),
        (["--rope", "[1]"], "invalid dict value: '[1]'"),
        (["--rope", "{"], "invalid dict value"),
        (["--kept", "1", "none"], "argument --kept: none stands for the whole list"),
        (["--layers", "none"], "invalid int value: 'none'"),
        (["--n_emb", "96"], "unrecognized arguments: --n_emb"),  # no guessing from abbreviations
        (["--lower", "1"], "unrecognized arguments: --lower"),
        (["--root", "1"], "unrecognized arguments: --root"),
        (["--base_config", "1"], "unrecognized arguments"),
    ],
)
def test_a_mistyped_flag_exits_with_status_2_and_says_which(config, capsys, argv, message):
    with pytest.raises(SystemExit) as exit_:
        settings.load(config, argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_validation_sees_the_flags(config):
    with pytest.raises(ValueError, match="N_EMBD=100 must be divisible by N_LAYER=6: use 384"):
        settings.load(config, ["--n_embd", "100"])


def test_comments_and_sections_are_read_from_the_source(config):
    found = settings.constants_of(config)
    assert {name: c.section for name, c in found.items() if c.section == "System"}.keys() == {
        "SEED", "OUT", "TRAIN_DATA_PATH", "BATCH"
    }  # fmt: skip
    assert found["N_EMBD"].help == "width, 100% of it"
    assert found["DROPOUT"].help == "share of dropped units"
    assert found["LAYERS"].help == "which layers"
    assert found["NAMES"].help == "transforms by name"
    assert found["SEED"].help == "of all randomness"  # not that of the local name
    assert found["BATCH"].help == "sequences"
    assert list(found)[:3] == ["N_LAYER", "N_EMBD", "DROPOUT"]


def test_help_shows_every_flag_with_its_text(config, capsys):
    with pytest.raises(SystemExit) as exit_:
        settings.load(config, ["--help"], description="What it does.\n    And more: 5%.")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for constant in settings.constants_of(config).values():
        assert f"--{constant.name.lower()}" in text
        assert constant.help in " ".join(text.split())
    assert "What it does." in text
    assert "And more: 5%." in text


def test_sections_restrict_the_flags_but_not_the_result(config, capsys):
    s = settings.load(config, ["--seed", "1"], sections=("System",))
    assert (s.SEED, s.N_EMBD) == (1, 384)
    with pytest.raises(SystemExit):
        settings.load(config, ["--n_embd", "96"], sections=("System",))
    assert "unrecognized arguments" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Sistem"):
        settings.load(config, [], sections=("Sistem",))


def test_argv_none_means_the_command_line(config, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--seed", "7"])
    assert settings.load(config).SEED == 7


def test_the_module_stays_untouched(config):
    before = copy.deepcopy({k: v for k, v in vars(config).items() if k.isupper()})
    s = settings.load(config, ["--n_embd", "96", "--no_tie_head"])
    s.LAYERS.append(3)
    s.N_LAYER = 0
    assert {k: v for k, v in vars(config).items() if k.isupper()} == before
    assert settings.load(config, []).LAYERS == [1, 2]


def test_as_dict_is_plain_json(config):
    plain = settings.load(config, ["--rope", '{"a": [1]}']).as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["OUT"] == str(Path("a/b"))
    assert plain["BETAS"] == [0.9, 0.95]
    assert "overrides" not in plain


def test_settings_survive_copy_and_pickle(config):
    s = settings.load(config, ["--seed", "3"])
    for twin in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert twin.as_dict() == s.as_dict()
        assert twin.overrides == {"SEED"}


def test_base_config_is_inherited_and_own_constants_win(tmp_path, config):
    source = (
        "from common.test_settings import BASE as BASE_CONFIG\n# == Tuning ==\nTOP_K = 10\nRANK = 8  # of the update\n"
    )
    source += "DROPOUT = 0.5  # another text\n"
    globals()["BASE"] = config
    child = make_config(tmp_path, source, "child_config")
    s = settings.load(child, ["--n_embd", "96", "--rank", "4"])
    assert (s.N_EMBD, s.RANK, s.TOP_K, s.DROPOUT, s.N_LAYER) == (96, 4, 10, 0.5, 6)
    found = settings.constants_of(child)
    assert found["TOP_K"].help == "keep the k most likely"
    assert settings.load(child, ["--top_k", "none"]).TOP_K is None  # the annotation is inherited, too
    assert found["DROPOUT"].help == "another text"
    assert found["N_EMBD"].section == "Model"
    assert found["RANK"].section == "Tuning"
    assert config.DROPOUT == 0.0


def test_a_new_default_may_have_another_type(tmp_path):
    globals()["BASE"] = make_config(tmp_path, "RATE = 1  # of learning\n", "integer_config")
    child = make_config(tmp_path, "from common.test_settings import BASE as BASE_CONFIG\nRATE = 0.5\n", "float_config")
    assert settings.load(child, ["--rate", "0.25"]).RATE == 0.25


def test_print_config_marks_what_a_flag_changed(config, capsys):
    settings.print_config(settings.load(config, ["--seed", "9"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("*")] == [line for line in lines if " SEED " in line]
    assert next(line for line in lines if " SEED " in line).split()[:3] == ["*", "SEED", "9"]
    assert lines.count("Model:") == lines.count("System:") == 1
    assert any("N_EMBD" in line and "384" in line and "width" in line for line in lines)


def test_print_config_of_the_module_itself(config, capsys):
    settings.print_config(config)
    assert "N_LAYER" in capsys.readouterr().out


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        example = make_config(folder, CONFIG.lstrip())
        settings.print_config(settings.load(example, ["--n_embd", "96", "--top-k", "50"]))
    raise SystemExit(pytest.main([__file__]))
