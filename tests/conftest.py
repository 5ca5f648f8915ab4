import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# a loaded weight lies where its file's header ends, and on some CPUs MKL rounds otherwise there
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import tiny
import torch

logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(params=sorted(tiny.MODELS))
def model(request):
    """A tiny random model of every family, float32."""
    torch.manual_seed(0)
    return tiny.MODELS[request.param]()


@pytest.fixture
def sd3():
    return tiny.sd3_model()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny SD3 pipeline in diffusers' layout."""
    folder = tmp_path_factory.mktemp("base")
    tiny.sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    """Three of them in a file."""
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\na bird\n")
    return file
