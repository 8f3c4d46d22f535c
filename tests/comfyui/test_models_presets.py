"""Presets, and Refiner at an Endpoint, inside ComfyUI; both in one process."""

import json
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def found(inprocess, tmp_path_factory):
    return inprocess(Path(__file__), tmp_path_factory.mktemp("base"))


def test_presets_are_the_built_in_ones_and_the_users(found):
    names = found["presets"]
    assert {"repair", "rewrite", "reprompt", "mine", "broken"} <= set(names["all"])
    assert "repair" in names["looking"] and "reprompt" not in names["looking"]
    assert "reprompt" in names["text"] and "repair" not in names["text"]
    assert "mine" in names["looking"] and "mine" in names["text"]  # it has a section for both
    assert "broken" in names["looking"] and "broken" in names["text"]  # to say what is wrong with it when it is chosen
    assert names["own repair"] == "mine"  # the user's file of that name stands in for the built-in one


def test_a_broken_or_missing_preset_names_file_and_remedy(found):
    assert "broken.txt" in found["broken preset"] and "first line" in found["broken preset"]
    assert (
        "'nosuch'" in found["missing preset"] and "repair" in found["missing preset"] and "templates" in found["missing preset"]
    )


def test_an_endpoint_is_asked(found):
    assert found["endpoint"]["prompt"] == "a red cat on a blue mat"
    assert found["endpoint"]["tokens"] == 33 and found["endpoint"]["temperature"] == 0.5


def test_a_server_that_is_not_there_is_told_before_sampling(found):
    for name in ("down", "no address"):
        assert "cannot be asked" in found[name] or "url is" in found[name]
        assert len(found[name].splitlines()) == 1
    assert "connection refused" in found["down"] and "is the server running" in found["down"]
    assert found["wrong url"].startswith("url is 'localhost'") and found["right url"] is True
    assert "key" in found["wrong key"] and "401" in found["wrong key"]
    assert found["down, unchecked"]["error"] and found["down, unchecked"]["prompt"] is None


def test_a_key_is_never_repeated(found):
    assert "sk-verysecret" not in found["key"] and "never the key itself" in found["key"]
    assert "no environment variable" in found["unset"]
    assert "begins with PROMPTLOOP_" in found["anothers"]  # a workflow from somebody else must not send any variable anywhere


# --- inside ComfyUI ---------------------------------------------------------------------------------------------------


def presets(here):
    folder = here.presets_module.user_folder()
    names, load = here.presets_module.preset_names, here.presets_module.load_preset
    assert not folder.exists() and "repair" in names()  # it need not be there
    here.preset("mine", common.OWN)
    here.preset("broken", "[user]\nno source\n")
    found = {"all": names(), "looking": names(True), "text": names(False)}
    here.preset("repair", common.OWN.replace("mine", "my own repair"))
    found["own repair"] = "mine" if load("repair").source == "my own repair" else load("repair").source
    (folder / "repair.txt").unlink()
    return {
        "presets": found,
        "broken preset": common.error_of(load, "broken"),
        "missing preset": common.error_of(load, "nosuch"),
    }


def endpoints(here):
    Server = common.file_of("chat/server").Server
    widgets = {
        "model": "", "template": "rewrite", "key_env": "PROMPTLOOP_API_KEY", "timeout": 5.0, "sees": True, "check_first": True,
        "max_new_tokens": 33, "temperature": 0.5, "seed": 1,
    }  # fmt: skip

    def load(url, **kwargs):
        return here.endpoint.execute(url=url, **(widgets | kwargs)).result[0]

    with Server() as server:
        said = load(server.url).refine([common.view()])[0]
        asked = server.requests[-1]
    with Server(key="right", models_behaviour="401") as server:
        found = {"wrong key": common.error_of(load, server.url)}
    down = load(server.url, check_first=False).refine([common.view()])[0]
    check = here.endpoint.validate_inputs
    return found | {
        "endpoint": {"prompt": said.prompt, "tokens": asked["max_tokens"], "temperature": asked["temperature"]},
        "down": common.error_of(load, server.url),
        "no address": common.error_of(load, "http://nosuch.invalid:1"),
        "down, unchecked": {"error": down.error, "prompt": down.prompt},
        "wrong url": check(url="localhost"),
        "right url": check(url="localhost:11434"),
        "key": common.error_of(load, server.url, key_env="sk-verysecret"),
        "anothers": common.error_of(load, server.url, key_env="PATH"),
        "unset": common.error_of(load, server.url, key_env="PROMPTLOOP_NOT_SET"),
    }


def main(base):
    import inside

    inside.setup(base, extras=False)
    here = common.Inside(base)
    inside.answer(json.loads(json.dumps(presets(here) | endpoints(here), default=str)))


if __name__ == "__main__":
    import test_models_refiner as common

    main(sys.argv[1])
