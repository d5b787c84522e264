"""The real checkpoint against PyTorch: python -m pytest -m slow tests/test_smollm2.py (fetches SmolLM2, minutes)."""

import numpy as np
import pytest

WINDOWS, LENGTH = 20, 256


@pytest.mark.slow
def test_perplexity_of_smollm2_matches_pytorch():
    """Mean next-token loss of 20 windows of real text: perplexity equal to 1e-3 relative."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    from readme_jax import api, sources
    from readme_jax.data import DomainConfig, documents, pack

    folder = sources.resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    model = api.load(folder)
    docs = documents("wiki", DomainConfig(source="fallback"), "test")
    ids_NT, _ = pack(docs, model.tokenizer, LENGTH, WINDOWS * LENGTH, where="wiki", vocab=model.config.vocab)
    ours_NT = np.concatenate([_loss(model.logits(ids_NT[i : i + 4]), ids_NT[i : i + 4]) for i in range(0, WINDOWS, 4)])
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        batches = [torch.tensor(ids_NT[i : i + 4], dtype=torch.long) for i in range(0, WINDOWS, 4)]
        theirs_NT = np.concatenate([_loss(reference(b).logits.numpy(), b.numpy()) for b in batches])
    ours, theirs = np.exp(ours_NT.mean()), np.exp(theirs_NT.mean())
    print(f"perplexity of {WINDOWS} windows: ours {ours:.5f}, PyTorch {theirs:.5f}, relative {ours / theirs - 1:.2e}")
    assert abs(ours / theirs - 1) < 1e-3
    assert np.abs(ours_NT - theirs_NT).max() < 5e-3


def _loss(logits_BTV: np.ndarray, ids_BT: np.ndarray) -> np.ndarray:
    logits_BTV = logits_BTV[:, :-1].astype(np.float64)
    top_BT1 = logits_BTV.max(-1, keepdims=True)
    log_z_BT = np.log(np.exp(logits_BTV - top_BT1).sum(-1)) + top_BT1[..., 0]
    return log_z_BT - np.take_along_axis(logits_BTV, ids_BT[:, 1:, None], -1)[..., 0]
