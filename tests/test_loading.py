"""What is no whole, plain, decoder-only language model is refused with what it is, not loaded."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import byte_level_tokenizer
from lightning_blue.editing import EditModule
from lightning_blue.language_model.loading import checkpoint_dtype, load_language_model
from lightning_blue.support.errors import InputError

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
DOWN = "model.layers.1.mlp.down_proj.weight"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama of three layers, tied."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = byte_level_tokenizer(bos=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def config(**values: Any) -> Change:
    """Set values in config.json; None removes one."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    return lambda folder: save_file(
        change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"}
    )


def without(*names: str) -> Change:
    return weights(lambda all_: {name: w for name, w in all_.items() if name not in names})


def beside(**more: Tensor) -> Change:
    return weights(lambda all_: all_ | {name.replace("__", "."): w for name, w in more.items()})


def projections_as(dtype: torch.dtype) -> Change:
    return weights(
        lambda all_: {name: w.to(dtype) if "proj" in name else w for name, w in all_.items()}
    )


def write(name: str, content: bytes | str) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, by: float) -> Change:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * by)])

    return change


def pickled(content: Any = None, raw: bytes | None = None) -> Change:
    """Put a pickled file in the place of safetensors."""

    def change(folder: Path) -> None:
        found = load_file(folder / WEIGHTS) if content is None else content
        (folder / WEIGHTS).unlink()
        torch.save(found, folder / PICKLED)
        if raw is not None:
            (folder / PICKLED).write_bytes(raw)

    return change


def sharded(index: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return change


def then(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


REMOTE = {"AutoConfig": "configuration_foo.Foo", "AutoModelForCausalLM": "modeling_foo.Foo"}
CASES: dict[str, tuple[Change, str, str]] = {
    # what belongs together
    "a weight is missing": (without(DOWN), f"1 weight is not in the checkpoint.*{DOWN}", "whole|a"),
    "more layers": (config(num_hidden_layers=6), "27 weights are not.*layers.3", "layers = 6"),
    "fewer layers": (config(num_hidden_layers=2), "9 weights are in.*layers.2", "layers = 2"),
    "a norm that is dropped": (
        beside(model__layers__1__self_attn__q_norm__weight=torch.ones(8)),
        "no place: model.layers.1.self_attn.q_norm.weight",
        "config.json",
    ),
    "another size": (
        config(intermediate_size=64),
        r"9 weights are of another size.*\(32, 96\), and should be \(32, 64\)",
        "take the config.json",
    ),
    # damaged files
    "cut": (cut(WEIGHTS, 0.5), "no whole safetensors file", "cut off"),
    "empty": (write(WEIGHTS, b""), "it is empty", "download"),
    "garbage": (write(WEIGHTS, b"hello " * 500), "no whole safetensors file", "download"),
    "git lfs": (
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"),
        "pointer of Git LFS",
        "git lfs pull",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no weights", "are config.json"),
    "a shard is missing": (
        sharded({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}),
        "1 of 2 weight files are missing: b.safetensors",
        "the rest",
    ),
    "an index that is none": (sharded(["a"]), "list of weight files cannot be read", "again"),
    "pickled garbage": (pickled(raw=b"hello"), "never run", "safetensors"),
    "pickled nothing": (pickled(raw=b""), "it is empty", "download"),
    "pickled code": (pickled(raw=pickle.dumps(print, 2)), "never run", "safetensors"),
    "pickled objects": (pickled({"a": Path("x")}), "never run", "safetensors"),
    "pickled list": (pickled([torch.ones(2)]), "no weights by name", "again"),
    "pickled, cut": (then(pickled(), cut(PICKLED, 0.9)), "no file of weights that can be", "again"),
    "config that is none": (write("config.json", '{"a'), "no valid JSON", "take the config.json"),
    "config that is a list": (write("config.json", "[]"), "no model_type", "take the config.json"),
    "empty config": (write("config.json", ""), "config.json is empty", "take the config.json"),
    "config without type": (config(model_type=None), "no model_type", "take the config.json"),
    "config of nonsense": (config(hidden_size="abc"), "cannot be loaded.*hidden_size", "together"),
    "config that divides by 0": (config(num_attention_heads=0), "cannot be loaded", "together"),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "the tokenizer cannot be loaded",
        "tokenizer.json",
    ),
    # another kind of model
    "unknown type": (config(model_type="foo"), "'foo' is not part of transformers", "install -U"),
    "remote code": (config(model_type="foo", auto_map=REMOTE), "never run here", "transformers"),
    "classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        "a classifier of texts",
        "decoder-only",
    ),
    "encoder-decoder": (config(model_type="t5"), "t5 is an encoder-decoder", "decoder-only"),
    "masked": (
        config(model_type="bert", architectures=["BertForMaskedLM"]),
        "masked language model",
        "decoder-only",
    ),
    "vision": (config(model_type="vit", architectures=None), "vit is no language model", "decoder"),
    "adapter": (
        write("adapter_config.json", '{"base_model_name_or_path": "org/base"}'),
        "PEFT adapter for org/base",
        r"merge_and_unload\(\)",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "holds no config.json",
        "copy config.json",
    ),
    # quantised
    "gptq": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantised \(gptq, 4 bits\)",
        "unquantised copy",
    ),
    "awq": (
        config(quantization_config={"quant_method": "awq", "w_bit": 4}),
        r"quantised \(awq, 4 bits\)",
        "on their page",
    ),
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        r"quantised \(bitsandbytes, 8 bits\)",
        r"\.dequantize\(\)",
    ),
    "mxfp4": (
        config(quantization_config={"quant_method": "mxfp4"}),
        r"quantised \(mxfp4\)",
        r"Mxfp4Config\(dequantize=True\)",
    ),
    "compressed-tensors": (
        config(quantization_config={"quant_method": "compressed-tensors"}),
        r"quantised \(compressed-tensors\)",
        r"CompressedTensorsConfig\(dequantize=True\)",
    ),
    "of no known kind": (config(quantization_config={"x": 1}), "an unnamed method", "unquantised"),
    "int8 without a word": (projections_as(torch.int8), "stored as I8", "unquantised copy"),
    "uint8 without a word": (projections_as(torch.uint8), "stored as U8", "unquantised copy"),
    "float8 without a word": (
        projections_as(torch.float8_e4m3fn),
        "21 weights of the checkpoint are stored as F8_E4M3",
        "unquantised copy",
    ),
    "packed by GPTQ without a word": (
        beside(model__layers__0__mlp__up_proj__qweight=torch.ones(4, 4, dtype=torch.int32)),
        "1 weights of the checkpoint are stored as I32",
        "unquantised copy",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_is_refused_with_what_it_is(case: str, copy: Path) -> None:
    change, what, hint = CASES[case]
    change(copy)
    with pytest.raises(InputError) as caught:
        load_language_model(str(copy))
    said, where, advice = str(caught.value).split("\n")
    assert re.search(what, said), said
    assert str(copy) in where
    assert re.search(hint, advice), advice


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda folder: None, torch.float32),
        (pickled(), torch.float32),
        (config(auto_map=REMOTE), torch.float32),  # its type is part of transformers
        (without("lm_head.weight"), torch.float32),  # tied: it never was there
        (then(projections_as(torch.bfloat16), config(dtype="bfloat16")), torch.bfloat16),
        (then(projections_as(torch.float16), config(dtype="float16")), torch.float16),
        (config(dtype="bfloat16"), torch.float32),  # the file holds more than it says
        (projections_as(torch.float16), torch.float32),  # and less: loaded as it says
    ],
)
def test_what_is_whole_is_loaded(change: Change, dtype: torch.dtype, copy: Path) -> None:
    change(copy)
    model, _ = load_language_model(str(copy))
    assert model.dtype == torch.float32
    assert checkpoint_dtype(model) == dtype


def test_what_is_left_out_is_named(copy: Path) -> None:
    beside(score__weight=torch.ones(2, 32))(copy)
    with pytest.warns(UserWarning, match=r"no place for 1 tensors.*score\.weight"):
        load_language_model(str(copy))


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        (WEIGHTS, "this is a file", "the folder that it stands in"),
        ("tokenizer.json", "this is a file", "the folder that it stands in"),
        ("modle", "no such file or folder", "did you mean '.*/model'"),
        ("nothing/at/all", "there is no folder", "check the path"),
    ],
)
def test_a_path_that_is_no_folder(name: str, what: str, hint: str, whole, tmp_path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    path = folder / name if (folder / name).exists() else tmp_path / name
    with pytest.raises(InputError, match=what) as caught:
        load_language_model(str(path))
    assert re.search(hint, str(caught.value))


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["model/config.json"], "the folder inside it is one: .*/model$"),
        (["snapshots/0a1b/config.json"], "the folder inside it is one: .*/0a1b$"),
        (["some.Q4_K_M.gguf"], "give the GGUF file itself: .*Q4_K_M.gguf"),
        (["consolidated.00.pth", "params.json"], "their Hugging Face version"),
        ([], "the folder is empty"),
    ],
)
def test_a_folder_around_a_model_says_where_it_is(files, hint, tmp_path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=r"no config\.json") as caught:
        load_language_model(str(tmp_path))
    assert re.search(hint, str(caught.value))


def test_quantised_is_refused_before_any_weight_is_read(copy, monkeypatch) -> None:
    config(quantization_config={"quant_method": "fp8"})(copy)
    (copy / WEIGHTS).unlink()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(InputError, match=r"quantised \(fp8\)"):
        load_language_model(str(copy))


def test_the_way_out_of_float8_works(copy: Path, tmp_path: Path, monkeypatch) -> None:
    """What the hint says, done: the copy it makes is loaded, near the weights before."""
    pytest.importorskip("accelerate", reason="transformers unpacks float8 with accelerate only")
    before, block = load_file(copy / WEIGHTS), 16

    def packed(all_: dict[str, Tensor]) -> dict[str, Tensor]:
        found = dict(all_)
        for name in (name for name in all_ if "proj" in name):
            d_out, d_in = all_[name].shape
            blocks = all_[name].view(d_out // block, block, d_in // block, block)
            scale = blocks.abs().amax((1, 3)) / 448  # the largest float8 of this kind
            scaled = (blocks / scale[:, None, :, None]).reshape(d_out, d_in)
            found |= {name: scaled.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
        return found

    stated = {"quant_method": "fp8", "weight_block_size": [block, block]}
    then(weights(packed), config(quantization_config=stated))(copy)
    with pytest.raises(InputError) as caught:
        load_language_model(str(copy))
    command = re.search(r"make one: (.*?\)), save the tokenizer", str(caught.value))
    assert command is not None
    monkeypatch.chdir(tmp_path)
    names = ("AutoModelForCausalLM", "FineGrainedFP8Config")
    eval(command[1], {name: getattr(transformers, name) for name in names})
    for path in copy.glob("tokenizer*"):
        shutil.copy(path, "FOLDER")
    after = load_language_model("FOLDER")[0].state_dict()[DOWN]
    assert (after - before[DOWN]).norm() < 2**-4 * before[DOWN].norm()  # half a step of 3 bits


class Packed(torch.nn.Module):
    """A linear map as quantisers leave it: no matrix of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(12, 32, dtype=torch.int32))


@pytest.mark.parametrize("how", ["a library's module", "a buffer", "integers", "as it was loaded"])
def test_a_quantised_model_in_memory_is_refused(how: str, whole: Path, monkeypatch) -> None:
    model, tokenizer = load_language_model(str(whole))
    mlp = model.model.layers[1].mlp
    if how == "integers":
        mlp.down_proj.weight = torch.nn.Parameter(torch.ones(32, 96).to(torch.int8), False)
    elif how == "as it was loaded":
        model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        model.hf_quantizer = object()
    else:
        mlp.down_proj = Packed()
        if how == "a library's module":
            monkeypatch.setattr(Packed, "__module__", "bitsandbytes.nn.modules")
    expected = {"a buffer": "qweight is int32", "integers": "weight is int8"}
    with pytest.raises(InputError, match=expected.get(how, "quantised .bitsandbytes")):
        EditModule(model, tokenizer)
