"""A GGUF file is edited like any other model, and leaves as a plain folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conftest import LanguageModel
from helpers import load_model
from lightning_blue.__main__ import main
from lightning_blue.language_model.loading import checkpoint_dtype, load_language_model, loaded_name
from lightning_blue.support.errors import InputError

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TEXT = "The mother tongue of Danielle"


def gguf_name(name: str) -> str:
    """Return the name that llama.cpp has for a weight of a Llama."""
    module = name.removesuffix(".weight")
    if module in NAMES:
        return f"{NAMES[module]}.weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.weight"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order rotary halves as llama.cpp does: pairs beside each other."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str
) -> Path:
    """Write a Llama as a GGUF file, its matrices in a type of ggml."""
    gguf = pytest.importorskip("gguf", reason="needs lightning-blue[gguf]")
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(True)
    wanted = getattr(gguf.GGMLQuantizationType, kind)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            query = "q_proj" in name
            heads = config.num_attention_heads if query else config.num_key_value_heads
            weight = interleaved(weight, heads)
        values = weight.float().contiguous().numpy()
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            packed = gguf.quants.quantize(values, wanted)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "dtype", "rounding"),
    [
        ("F32", torch.float32, 0.0),
        ("F16", torch.float16, 2**-11),
        ("BF16", torch.bfloat16, 2**-8),
        ("Q8_0", torch.float32, 2**-7),  # half a step of 127 to the largest of 32 weights, at most
    ],
)
def test_weights_and_tokens_are_those_of_the_file(
    kind: str, dtype: torch.dtype, rounding: float, llama: LanguageModel, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", *llama, kind)
    model, tokenizer = load_language_model(str(path))
    assert checkpoint_dtype(model) == dtype
    assert loaded_name(model) == str(path)
    assert tokenizer(TEXT)["input_ids"] == llama.tokenizer(TEXT)["input_ids"]
    found = model.state_dict()
    for name, weight in llama.model.state_dict().items():
        largest = weight.abs().max()
        assert (found[name] - weight).abs().max() <= rounding * largest, name
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    plain, _ = load_model(tmp_path / "folder")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, found[name]), name


def test_is_edited_and_exported_as_a_plain_folder(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """From the command line to the folder, which plain transformers read as it was measured."""
    path = write_gguf(tmp_path / "tiny.gguf", *llama, "F16")
    facts = tmp_path / "facts.jsonl"
    request = {"subject": "Lyon", "prompt": "{} is a twin city of", "target_new": "Rome"}
    facts.write_text(json.dumps(request))
    text = tmp_path / "text.txt"
    text.write_text("Lyon is a twin city of Beirut. She plays the violin in Rome.\n" * 200)
    monkeypatch.chdir(tmp_path)
    code = main(
        [
            "fit",
            f"--model.name_or_path={path}",
            "--model.contexts=[]",
            "--model.target.learning_rate=1",
            "--model.target.clamp=50",
            "--model.target.weight_decay=0",
            "--model.target.kl_weight=0",
            f"--model.covariance.corpus={text}",
            "--model.covariance.tokens_per_dim=3",
            "--update.layers=[1,2]",
            "--update.covariance_weight=0.0001",
            f"--data.path={facts}",
            "--data.controls=0",
            f"--measure.text={text}",
            "--run.wandb=off",
        ]
    )
    assert code == 0, capsys.readouterr().err
    folder = tmp_path / "runs/edit/model"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert "quantization_config" not in config
    model, tokenizer = load_model(folder)
    model.float()  # as it was measured
    ids = tokenizer("Lyon is a twin city of Rome", return_tensors="pt")["input_ids"]
    start = len(tokenizer("Lyon is a twin city of")["input_ids"])
    with torch.no_grad():
        log_probs = model(ids).logits.float().log_softmax(-1)
    said = log_probs[0, start - 1 : -1].gather(1, ids[0, start:, None]).mean().exp()
    outcome = json.loads((tmp_path / "runs/edit/edits.jsonl").read_text())
    before, after = (outcome[key]["probability_new"] for key in ("before", "after"))
    assert after > 1.1 * before
    assert float(said) == pytest.approx(after, rel=1e-4)  # float32; what is measured is saved


@pytest.mark.parametrize("content", [b"hello", b"GGUF" + bytes(100), b""])
def test_a_file_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match="the GGUF file cannot be read") as caught:
        load_language_model(str(path))
    assert f"model.name_or_path = {path}" in str(caught.value)


def test_a_file_that_is_cut_off_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", *llama, "F32")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match="the GGUF file cannot be read"):
        load_language_model(str(path))


def test_without_the_extra_the_message_says_how_to_install(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", *llama, "F32")
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda: False)
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    with pytest.raises(InputError, match=r"pip install 'lightning-blue\[gguf\]'"):
        load_language_model(str(path))
