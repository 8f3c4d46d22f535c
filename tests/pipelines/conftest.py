"""The pipelines under test: tiny random ones of the four families, and the trained embedded one."""

import pytest
import torch

from promptloop_pipeline import tiny

from .factories import EXTRA, MAKERS

FAMILIES = [*MAKERS, "embedded"]


class Maker:
    """A pipeline, and how to call it so that a test takes milliseconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pipe = tiny.load_pipeline("sd") if name == "embedded" else MAKERS[name]()
        self.pipe.set_progress_bar_config(disable=True)

    def kwargs(self, *seeds: int, **changes):
        generators = [torch.Generator().manual_seed(s) for s in seeds or (1,)]
        common = {"num_inference_steps": 5, "height": 32, "width": 32, "output_type": "latent"}
        return common | EXTRA.get(self.name, {}) | {"generator": generators if len(generators) > 1 else generators[0]} | changes


_MADE: dict[str, Maker] = {}


def made(name: str) -> Maker:
    """The one that all tests share, made when it is first asked for; a test leaves it as it was."""
    if name not in _MADE:
        _MADE[name] = Maker(name)
    return _MADE[name]


@pytest.fixture(scope="session")
def makers():
    return _MADE


@pytest.fixture(params=FAMILIES)
def host(request):
    return made(request.param)
