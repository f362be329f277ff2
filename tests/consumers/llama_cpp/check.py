"""Does llama.cpp say with a GGUF file what sqft's model says? Run without sqft.

    python check.py MODEL.gguf GIVEN.json

GIVEN holds `prompts`, each with the `tokens` it is and the `logprobs` of the most likely next ones (by token id), the
`answers` of a number of tokens that the model generates greedily after each of them, or none, and a `tolerance`. Prints
the largest difference of a log probability, how many answers are equal, and tokens a second; exits with 1 when the
difference is above the tolerance, or a prompt has another number of tokens.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import xllamacpp


def main(model: str, given: str) -> int:
    assert importlib.util.find_spec("sqft") is None, "sqft must not be here: another program is to load the file"
    wanted = json.loads(Path(given).read_text("utf-8"))
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.warmup = model, 256, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    largest, equal, lengths = 0.0, 0, []
    start = time.perf_counter()
    for number, prompt in enumerate(wanted["prompts"]):
        answer = wanted["answers"][number] if wanted["answers"] else None
        said = complete(server, prompt["text"], answer["tokens"] if answer else 1, len(prompt["logprobs"]))
        lengths.append((said["usage"]["prompt_tokens"], len(prompt["tokens"])))
        (choice,) = said["choices"]
        found = {str(one["id"]): one["logprob"] for one in choice["logprobs"]["content"][0]["top_logprobs"]}
        for token, expected in prompt["logprobs"].items():
            if token in found:  # one that is nearly as likely as the next may have taken its place
                largest = max(largest, abs(found[token] - expected))
        first = max(prompt["logprobs"], key=prompt["logprobs"].get)
        assert first in found, f"{prompt['text']!r}: {first} is not among {found}"
        equal += bool(answer) and choice["text"] == answer["text"]
    spent = time.perf_counter() - start
    print(
        f"largest difference {largest:.3g}, tolerance {wanted['tolerance']:.3g}; {equal} of {len(wanted['answers'])} "
        f"answers are equal; {len(wanted['prompts']) / spent:.1f} prompts a second"
    )
    different = [pair for pair in lengths if pair[0] != pair[1]]
    print(f"prompts of other lengths: {different}" if different else "all prompts have the same tokens' number")
    return 0 if largest <= wanted["tolerance"] and not different else 1


def complete(server: Any, text: str, tokens: int, likely: int) -> Any:
    request = {"prompt": text, "n_predict": tokens, "temperature": 0, "n_probs": likely, "cache_prompt": False}
    return server.handle_completions(request)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
