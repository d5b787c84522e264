"""The runner against one-at-a-time generation: every family, any pages, any mix of rows, waves; what it compiles."""

import jax
import numpy as np
import pytest
from run_rows import CONTEXT, FAMILIES, Loop, write

from readme_jax import api
from readme_jax.serving.policies import Limits

NEW = 10
PROMPTS = [[5, 9, 130], [7] * 19 + [11, 120, 3], list(range(20, 75)), [1]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folder, written when first asked for."""
    root, made = tmp_path_factory.mktemp("served"), {}

    def get(name, **options):
        key = name + str(sorted(options.items()))
        if key not in made:
            made[key] = write(root / f"{len(made)}", FAMILIES[name], **options)
        return made[key]

    return get


def alone(folder, prompts, new=NEW, **options):
    """What part 1 generates, one prompt at a time."""
    model = api.Model(folder)
    return [model.generate([p], max_new_tokens=new, stop_tokens=[], **options)[0].tolist() for p in prompts]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_and_experts_are_those_of_generate(folders, name):
    folder = folders(name)
    loop = Loop(folder, seed=1)
    requests = [loop.request(p, max_new_tokens=NEW, logprobs=20) for p in PROMPTS]
    scores = loop.run(requests)
    model = api.Model(folder)
    for request, expected, got in zip(requests, alone(folder, PROMPTS), scores):
        assert request.tokens[len(request.prompt) :] == expected
        whole = [request.tokens]
        assert request.experts == model.route(whole)[0].tolist()
        logits_TV = model.logits(whole)[0][len(request.prompt) - 1 : -1].astype(np.float64)
        logprob_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        np.testing.assert_allclose([s.logprob for s in got], logprob_TV.max(-1), atol=1e-4)
        for row_V, score in zip(logprob_TV, got):
            np.testing.assert_allclose([p for _, p in score.best], np.sort(row_V)[::-1][:20], atol=1e-4)
            np.testing.assert_allclose([p for _, p in score.best], row_V[[i for i, _ in score.best]], atol=1e-4)
    loop.runner.close()
