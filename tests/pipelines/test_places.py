"""Models as people have them: what a path is, variants, missing parts, single files, and a hub that says no."""

import importlib
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import single_files
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file

import diffalign
from diffalign.core.errors import UserError
from diffalign.pipelines import hub
from diffalign.pipelines.places import Place, UnknownModel, look
from diffalign.pipelines.registry import load_meta_model, load_model, resolve

HTTP = HfHubHTTPError.__mro__[1].__module__.partition(".")[0]
httpx = importlib.import_module(HTTP)
"""The HTTP library of the hub's client."""
PROMPT = ["a photo of a red circle"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tiny pipelines by family."""
    root = tmp_path_factory.mktemp("saved")
    for family in ("sd3", "sd", "flux"):
        getattr(tiny, f"{family}_pipeline")().save_pretrained(root / family)
    return root


@pytest.fixture(autouse=True)
def _nothing_is_remembered_of_the_hub():
    hub.repository.cache_clear()


def one_line(raised):
    assert "\n" not in str(raised.value)
    return str(raised.value)


class TestLook:
    def test_what_exists_is_never_a_hub_id(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "dream.safetensors").touch()
        assert look("models/dream.safetensors") == Place("file", "models/dream.safetensors")
        with pytest.raises(
            UnknownModel, match=r"models has no model_index\.json; it holds the sin"
        ):
            look("models")
        (tmp_path / "models" / "empty").mkdir()
        with pytest.raises(UnknownModel, match="it is empty"):
            look("models/empty")

    @pytest.mark.parametrize(
        ("name", "source", "revision"),
        [
            ("owner/name", "owner/name", None),
            ("owner/name@main", "owner/name", "main"),
            ("owner/na.me-2@refs/pr/3", "owner/na.me-2", "refs/pr/3"),
            ("Owner_1/x@0a1b2c", "Owner_1/x", "0a1b2c"),
        ],
    )
    def test_hub_ids_and_revisions(self, name, source, revision):
        assert look(name) == Place("hub", source, revision)
        assert (resolve(name).source, resolve(name).revision) == (source, revision)

    @pytest.mark.parametrize(
        ("name", "files", "message"),
        [
            ("x/y/z", [], r"model\.name: x/y/z does not exist; neither does x/y"),
            ("./x", [], r"\./x does not exist"),
            ("here/ther", ["here/there/a"], None),
            ("here/a/ther", ["here/a/there/a"], r"did you mean here/a/there\?"),
            ("x.ckpt", ["x.ckpt"], "it is a pickle, which can run code"),
            ("x.gguf", ["x.gguf"], "GGUF are not supported"),
            ("x.txt", ["x.txt"], "is no model; give a folder in diffusers' layout"),
            ("run", ["run/lora/pytorch_lora_weights.safetensors"], "run/lora as `lora`"),
            ("run", ["run/pytorch_lora_weights.safetensors"], "it holds a LoRA: give its base"),
            ("run", ["run/adapter_model.safetensors"], "it holds a LoRA: give its base"),
            ("part", ["part/config.json"], "it is one component of a pipeline"),
            ("up", ["up/down/model_index.json"], "it holds a pipeline in up/down: give that"),
            ("c", ["c/snapshots/1f/model_index.json"], "it holds a pipeline in c/snapshots/1f"),
            ("dream.safetensors", [], r"dream\.safetensors does not exist"),
        ],
    )
    def test_what_holds_no_model_says_what_it_is(self, name, files, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        if message is None:  # one slash, nothing there: only the hub can know
            assert look(name) == Place("hub", name)
            return
        with pytest.raises(UnknownModel, match=message) as raised:
            look(name)
        one_line(raised)


class TestDamage:
    @pytest.mark.parametrize("value", [[], {}, None, 3, ["x"], "", [1, 2]])
    @pytest.mark.parametrize("load", [diffalign.load, load_model, load_meta_model])
    def test_a_class_name_that_is_none(self, value, load, saved, tmp_path):
        folder = shutil.copytree(saved / "sd", tmp_path / "sd")
        file = folder / "model_index.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": value}))
        with pytest.raises(UserError, match="_class_name must name a pipeline class") as raised:
            load(str(folder))
        one_line(raised)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[]", "an object was expected"),
            ("{", "could not be read"),
            ("\udcff", "could not be read"),
            ('{"_class_name": "StableDiffusionPipeline", "unet": [1]}', "unet must be a library"),
        ],
    )
    def test_a_damaged_index(self, text, message, tmp_path):
        (tmp_path / "model_index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=message) as raised:
            diffalign.load(str(tmp_path))
        one_line(raised)

    def test_shards_without_their_index(self, saved, tmp_path):
        tiny.sd_pipeline().save_pretrained(tmp_path, max_shard_size="15KB")
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()
        with pytest.raises(
            UserError, match=r"no diffusion_pytorch_model\.safetensors\.index\.json"
        ):
            diffalign.load(str(tmp_path))

    def test_a_pickle_that_holds_code(self, saved, tmp_path):
        folder = shutil.copytree(saved / "sd", tmp_path / "sd")
        (folder / "text_encoder" / "model.safetensors").unlink()
        torch.save({"x": print}, folder / "text_encoder" / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"pickle \(\.bin\)") as raised:
            diffalign.load(str(folder))
        assert "weights_only" not in one_line(raised)

    def test_a_component_that_is_needed(self, saved, tmp_path):
        folder = shutil.copytree(saved / "sd", tmp_path / "sd")
        shutil.rmtree(folder / "vae")
        with pytest.raises(UserError, match="has no folder vae") as raised:
            diffalign.load(str(folder))
        one_line(raised)


class TestFolders:
    @pytest.mark.parametrize("variant", ["fp16", "bf16", "ema"])
    def test_a_variant_alone_is_taken(self, variant, tmp_path):
        pipeline = tiny.sd3_pipeline()
        pipeline.save_pretrained(tmp_path, variant=variant)
        assert not list(tmp_path.glob("*/model.safetensors"))
        again = load_model(str(tmp_path), dtype=torch.float32).pipeline
        for name in ("transformer", "vae", "text_encoder", "text_encoder_3"):
            expected = getattr(pipeline, name).state_dict()
            for key, value in getattr(again, name).state_dict().items():
                torch.testing.assert_close(value, expected[key])

    def test_plain_weights_come_first_and_parts_may_differ(self, saved, tmp_path):
        folder = shutil.copytree(saved / "sd", tmp_path / "sd")
        tiny.sd_pipeline(1).save_pretrained(folder, variant="fp16")
        plain = diffalign.load(str(folder)).unet.state_dict()
        expected = tiny.sd_pipeline().unet.state_dict()
        assert all(torch.equal(plain[k], expected[k]) for k in plain)
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        mixed = diffalign.load(str(folder))
        expected = tiny.sd_pipeline(1).unet.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in mixed.unet.state_dict().items())

    @pytest.mark.parametrize("how", ["saved without", "entries null", "folders gone"])
    def test_sd3_without_t5(self, how, saved, tmp_path, caplog):
        folder = tmp_path / "sd3"
        if how == "saved without":
            StableDiffusion3Pipeline.from_pretrained(
                saved / "sd3", text_encoder_3=None, tokenizer_3=None
            ).save_pretrained(folder)
        else:
            shutil.copytree(saved / "sd3", folder)
            for part in ("text_encoder_3", "tokenizer_3"):
                shutil.rmtree(folder / part)
        if how == "entries null":
            file = folder / "model_index.json"
            index = json.loads(file.read_text())
            file.write_text(
                json.dumps(index | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]})
            )
        with caplog.at_level(logging.WARNING):
            model = load_model(str(folder), dtype=torch.float32, max_sequence_length=16)
        assert ("no folder text_encoder_3" in caplog.text) == (how == "folders gone")
        expected = model.pipeline(
            PROMPT,
            num_inference_steps=4,
            guidance_scale=4.5,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        drawn = tiny.rollout(
            model, PROMPT, generator=torch.Generator().manual_seed(0), guidance_scale=4.5
        )
        assert ((expected * 255).round().astype("uint8") == drawn).all()
        assert load_meta_model(str(folder)).pipeline.text_encoder_3 is None

    def test_a_safety_checker_that_was_not_downloaded(self, saved, tmp_path):
        folder = shutil.copytree(saved / "sd", tmp_path / "sd")
        file = folder / "model_index.json"
        told = {
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "requires_safety_checker": True,
        }
        file.write_text(json.dumps(json.loads(file.read_text()) | told))
        assert load_model(str(folder)).pipeline.safety_checker is None


def response(status):
    request = httpx.Request("GET", "https://huggingface.co")
    return httpx.Response(status, request=request)


class TestHub:
    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (GatedRepoError("x", response=response(403)), "is gated: accept its licence at https"),
            (RepositoryNotFoundError("x", response=response(401)), "check the spelling at https"),
            (RevisionNotFoundError("x", response=response(404)), "has no revision 'v2'"),
        ],
    )
    def test_refusals_say_what_to_do(self, error, message, monkeypatch):
        def refuse(*_, **__):
            raise error

        monkeypatch.setattr(HfApi, "model_info", refuse)
        with pytest.raises(UserError, match=message) as raised:
            load_model("owner/name@v2")
        assert "Traceback" not in one_line(raised)

    @pytest.mark.parametrize(
        "error", [httpx.ConnectError("no"), httpx.ReadTimeout("no"), OSError()]
    )
    def test_a_hub_that_cannot_be_reached_is_asked_once(self, error, monkeypatch):
        calls = []

        def fail(*_, **__):
            calls.append(1)
            raise error

        monkeypatch.setattr(HfApi, "model_info", fail)
        monkeypatch.setattr(httpx.Client, "send", fail)
        for load in (load_model, load_meta_model, diffalign.load):
            with pytest.raises(UserError, match=r"cannot be reached: check the spelling") as raised:
                load("nobody/nothing")
            one_line(raised)
        assert len(calls) == 1

    def test_a_variant_on_the_hub_is_found(self, saved, tmp_path, monkeypatch):
        tiny.sd_pipeline().save_pretrained(tmp_path, variant="fp16")
        files = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
        info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in files])
        monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: info)
        monkeypatch.setattr(hub, "fetch_index", lambda *_, **__: tmp_path / "model_index.json")
        from diffalign.pipelines.loading import open_folder

        folder = open_folder(Place("hub", "owner/name", "v2"), {})
        assert (folder.options["variant"], folder.options["revision"]) == ("fp16", "v2")


class TestSingleFiles:
    @pytest.fixture
    def dream(self, saved, tmp_path):
        """A transformer alone in one file, and its base's folder beside it."""
        pipeline = tiny.flux_pipeline(1)
        save_file(pipeline.transformer.state_dict(), tmp_path / "dream.safetensors")
        shutil.copytree(saved / "flux", tmp_path / "dream")
        return tmp_path / "dream.safetensors"

    def test_a_denoiser_with_its_base_beside_it(self, dream):
        model = load_model(str(dream), dtype=torch.float32, max_sequence_length=16)
        expected = tiny.flux_pipeline(1).transformer.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in model.denoiser.state_dict().items())
        assert model.pipeline.vae is not None
        assert model.latent_shape((16, 16)) == (4, 8, 8)
        assert load_meta_model(str(dream)).family == "flux"

    def test_a_whole_model_in_its_first_names(self, saved, tmp_path):
        """Weights of the U-Net, the autoencoder and the text encoder; the folder beside it has none."""
        pipeline = tiny.sd_pipeline(1)
        save_file(single_files.single_file(pipeline), tmp_path / "dream.safetensors")
        layout = shutil.copytree(saved / "sd", tmp_path / "dream")
        for weights in layout.glob("*/*.safetensors"):
            weights.unlink()
        model = load_model(str(tmp_path / "dream.safetensors"), dtype=torch.float32)
        for name in ("unet", "vae", "text_encoder"):
            expected = getattr(pipeline, name).state_dict()
            for key, value in getattr(model.pipeline, name).state_dict().items():
                assert torch.equal(value, expected[key]), key

    def test_a_base_is_given(self, dream, saved, tmp_path):
        shutil.rmtree(tmp_path / "dream")
        pipeline = diffalign.load(str(dream), config=str(saved / "flux"))
        assert type(pipeline).__name__ == "FluxPipeline"

    def test_without_its_configuration_it_says_what_is_needed(self, tmp_path):
        file = tmp_path / "dream.safetensors"
        save_file({"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(1)}, file)
        with pytest.raises(
            UserError, match=r"`hf download black-forest-labs/FLUX\.1-sch"
        ) as raised:
            load_model(str(file))
        one_line(raised)

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"unet.a.lora_A.weight": torch.ones(1)}, "holds a LoRA and no model"),
            ({"encoder.conv_in.weight": torch.ones(1)}, "holds no denoiser"),
            (None, r"no \.safetensors file that can be read"),
        ],
    )
    def test_a_file_of_something_else(self, tensors, message, tmp_path):
        file = tmp_path / "x.safetensors"
        file.touch() if tensors is None else save_file(tensors, file)
        for load in (load_model, diffalign.load):
            with pytest.raises(UserError, match=message) as raised:
                load(str(file))
            one_line(raised)
