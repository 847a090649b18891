"""One command starts everything, or says in a line why it cannot."""

import os
import socket

import pytest

from common import settings as settings_module
from phase10_deployment.project29_docker import agreement, config, manifests, stack, up

FOLDER = manifests.FOLDER


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """A docker command that writes down how it is called; `docker(info=1)` lets `docker info` fail with status 1."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("LLM_ROADMAP_API_KEYS", raising=False)

    def fail(**statuses):
        cases = "\n".join(f'*" {name} "*) exit {status};;' for name, status in statuses.items())
        program = f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nenv | grep ^LLM_ > {tmp_path}/env\n'
        program += f'case " $* " in\n{cases}\nesac\n'
        (folder / "docker").write_text(program, encoding="utf-8")
        (folder / "docker").chmod(0o755)

    fail()
    return fail


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model" / "best.pt"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def ports():
    """Flags with ports that are free, and those ports."""
    sockets = [socket.socket() for _ in config.PORTS]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return [word for name, port in zip(config.PORTS, found) for word in (f"--{name.lower()}", str(port))], found


def test_one_command_starts_everything(docker, checkpoint, ports, tmp_path, capsys):
    flags, (server, *_) = ports
    up.main(["--checkpoint", str(checkpoint), "--api_key", "k1", "k2", "--cuda", "--drain_seconds", "50", *flags])
    calls = (tmp_path / "calls").read_text().splitlines()
    files = f"--file {FOLDER}/compose.yaml --file {FOLDER}/compose.cuda.yaml"
    assert calls[-1] == f"compose {files} up --detach --wait --wait-timeout 900 --build"
    told = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert told["LLM_CHECKPOINTS"] == str(checkpoint.parent) and told["LLM_CHECKPOINT"] == "checkpoints/best.pt"
    assert told["LLM_ROADMAP_API_KEYS"] == "k1,k2" and told["LLM_TARGET"] == "cuda" and told["LLM_STOP_SECONDS"] == "60"
    assert f"http://localhost:{server}/v1" in capsys.readouterr().out


def test_what_compose_is_told_reaches_the_containers(checkpoint):
    settings = settings_module.load(config, ["--drain_seconds", "90", "--memory_gib", "2.5", "--ui_port", "1234"])
    values = stack.environment(settings, str(checkpoint))
    services = manifests.filled_in(manifests.documents(FOLDER / "compose.yaml")[0], values)["services"]
    server = services["server"]
    assert manifests.flag(server["command"], "checkpoint") == "checkpoints/best.pt"
    assert server["volumes"][0]["source"] == str(checkpoint.parent) and server["volumes"][0]["read_only"] is True
    assert server["deploy"]["resources"]["limits"]["memory"] == "2560m"
    assert services["ui"]["ports"] == ["127.0.0.1:1234:7860"]
    assert agreement.compose_rules(environment=values) == []
    used = {name.split(":-")[0] for name in (FOLDER / "compose.yaml").read_text(encoding="utf-8").split("${")[1:]} - {
        "NAME"
    }
    assert used - set(values) == {"LLM_GRAFANA_PASSWORD"}


def test_every_duration_that_can_be_asked_for_leaves_time_to_drain():
    for drain in (0, 30, 600):
        settings = settings_module.load(config, ["--drain_seconds", str(drain)])
        assert agreement.compose_rules(environment=stack.environment(settings, "org/name")) == []


def test_models_are_mounted_where_the_server_finds_them(tmp_path, checkpoint):
    inside = stack.CHECKPOINTS / "project3" / "best.pt"
    assert stack.mount_of("org/name") == (stack.CHECKPOINTS, "org/name")
    assert stack.mount_of(str(checkpoint)) == (checkpoint.parent, "checkpoints/best.pt")
    assert stack.mount_of(str(checkpoint.parent)) == (tmp_path, "checkpoints/model")
    if inside.exists():
        assert stack.mount_of(str(inside)) == (stack.CHECKPOINTS, "checkpoints/project3/best.pt")


def test_down(docker, tmp_path):
    up.main(["--down"])
    assert (tmp_path / "calls").read_text().splitlines()[-1] == f"compose --file {FOLDER}/compose.yaml down"


def test_a_dry_run_starts_nothing_and_shows_no_key(docker, checkpoint, ports, tmp_path, capsys):
    up.main(["--dry_run", "--checkpoint", str(checkpoint), "--api_key", "hush", *ports[0]])
    shown = capsys.readouterr().out
    assert "LLM_CHECKPOINT=checkpoints/best.pt" in shown and "hush" not in shown
    assert " up " not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        ({"info": 1}, "reaches no engine"),
        ({"version": 1}, "docker-compose-plugin"),
        ({"up": 17}, "docker compose ended with status 17"),
    ],
)
def test_a_docker_that_cannot(docker, checkpoint, ports, capsys, statuses, said):
    docker(**statuses)
    with pytest.raises(SystemExit) as exit_:
        up.main(["--checkpoint", str(checkpoint), *ports[0]])
    assert exit_.value.code == 2 and said in capsys.readouterr().err


def test_no_docker(monkeypatch, checkpoint, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        up.main(["--checkpoint", str(checkpoint)])
    assert capsys.readouterr().err == (
        "error: the docker command is missing: install Docker Engine or Docker Desktop\n"
    )  # fmt: skip


def test_a_port_that_is_taken(docker, checkpoint, ports, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", ports[1][1]))
        other.listen()
        with pytest.raises(SystemExit):
            up.main(["--checkpoint", str(checkpoint), *ports[0]])
    error = capsys.readouterr().err
    assert f"UI_PORT={ports[1][1]} cannot be used at 127.0.0.1" in error and "give another --ui_port" in error


def test_a_model_that_is_not_there_or_cannot_be_read(docker, checkpoint, ports, capsys):
    with pytest.raises(SystemExit):
        up.main(["--checkpoint", "nowhere/best.pt", *ports[0]])
    assert "CHECKPOINT=nowhere/best.pt does not exist" in capsys.readouterr().err
    checkpoint.chmod(0o600)
    with pytest.raises(SystemExit):
        up.main(["--checkpoint", str(checkpoint), *ports[0]])
    assert f"chmod -R o+rX {checkpoint.parent}" in capsys.readouterr().err


def test_the_network_is_let_in_only_with_a_key_and_a_password(monkeypatch):
    monkeypatch.delenv("LLM_ROADMAP_API_KEYS", raising=False)
    with pytest.raises(ValueError, match=r"BIND=0\.0\.0\.0 lets the network in: set a key"):
        settings_module.load(config, ["--bind", "0.0.0.0"])
    with pytest.raises(ValueError, match="--grafana_password"):
        settings_module.load(config, ["--bind", "0.0.0.0", "--api_key", "k"])
    monkeypatch.setenv("LLM_ROADMAP_API_KEYS", "a,b")
    settings = settings_module.load(config, ["--bind", "0.0.0.0", "--grafana_password", "p"])
    values = stack.environment(settings, "org/name")
    assert values["LLM_ROADMAP_API_KEYS"] == "a,b" and values["LLM_GRAFANA_ANONYMOUS"] == "false"


def test_two_services_cannot_have_one_port():
    with pytest.raises(ValueError, match="UI_PORT=8000 is the port of SERVER_PORT, too"):
        settings_module.load(config, ["--ui_port", "8000"])


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
