"""`--push_to_hub`, to a server that takes models as the hub does."""

import json

import pytest
from huggingface_hub import constants
from promptloop_training import main as training
from promptloop_training.main import main
from promptloop_training.plan import configure, plan

from .hub import Hub
from .test_main import here, same, small, talkative, weights  # noqa: F401

NAME, TOKEN = "me/my-refiner", "hf_secret"


@pytest.fixture
def at(monkeypatch):
    """As HF_ENDPOINT and the rest of the environment would have it, had they been set before huggingface_hub was imported."""

    def set(hub):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # LFS, which is a protocol of few words

    return set


def pushed(folder, **more):
    return small(folder, max_steps=1, push_to_hub=True, hub_model_id=NAME, **more)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_hub_that_refuses_leaves_the_result_and_the_command_pushes_later(tmp_path, at, monkeypatch, capsys):
    argv = [*pushed(tmp_path, hub_private_repo=True), "--hub_token", TOKEN]
    final = tmp_path / "out" / "final"
    with Hub("/commit/") as hub:
        at(hub)
        with pytest.raises(RuntimeError) as e:
            main(argv)
        told = f"{final} is whole, and not pushed to {NAME}: "
        assert str(e.value).startswith(told) and "You have no quota left" in str(e.value) and "\n" not in str(e.value)
        assert str(e.value).endswith("; the same command pushes it, and no more") and TOKEN not in str(e.value)
        assert hub.repos == {NAME: {"main": {}}}
    kept = files(final)
    assert weights(final) and {"README.md", "template.txt", "trained.json", "config.json"} <= set(kept)
    assert not [name for name, content in files(tmp_path / "out").items() if TOKEN.encode() in content]
    assert "trained 1 steps" in capsys.readouterr().out

    monkeypatch.setattr(training, "load", None)  # nothing is loaded or trained again
    with Hub() as hub:
        at(hub)
        assert main(argv) == 0
        assert hub.repos == {NAME: {"main": kept}} and hub.private == {NAME: True}  # that folder, and nothing else
        assert capsys.readouterr().out.splitlines() == [f"this run is done: {final}", f"pushed to {NAME}"]
        assert main([*argv, "--hub_revision", "v2"]) == 0
        assert hub.repos == {NAME: {"main": kept, "v2": kept}}
    assert files(final) == kept
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(RuntimeError, match="is whole, and not pushed to me/my-refiner: .*refused; the same command pushes it"):
        main(argv)


def test_nothing_is_pushed_of_a_run_that_stopped(tmp_path, at):
    with Hub() as hub:
        at(hub)
        with pytest.raises(RuntimeError, match="stopped at step 1"):
            main([*pushed(tmp_path, rewards=f"{__package__}.test_push:broken"), "--hub_token", TOKEN])
        assert hub.calls == []


def broken(images, prompts, **_):
    raise ValueError("no judge")


def test_whoever_is_not_logged_in_is_told_before(tmp_path, monkeypatch):
    argv = ["--push_to_hub", "true", "--hub_model_id"]
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN"):
        configure([*argv, NAME])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert configure([*argv, NAME])[0].push_to_hub
    for wrong in ("my-refiner", "me/my refiner"):
        with pytest.raises(ValueError, match=wrong):
            configure([*argv, wrong])


def test_no_token_is_written_down(tmp_path):
    for said in (["--hub_token", TOKEN], [f"--hub-token={TOKEN}"]):
        it = plan([*pushed(tmp_path)[1:], *said, "--turns", "2"])
        assert it.token == TOKEN and TOKEN not in json.dumps(it.manifest()) + repr(it)
        assert it.command[-2:] == ["--turns", "2"]
