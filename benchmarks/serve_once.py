"""Measure one program that serves a model on the CPU; run by serving.py in that program's own environment.

    python serve_once.py PROGRAM PATH PROMPT GENERATED THREADS

Prints a line of JSON: tokens a second of `prefill` (a prompt of PROMPT tokens at once) and of `decode` (GENERATED
tokens, one after the other, chosen greedily), and the process's peak `memory` in MB, loading included. A first, short
run is not counted.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS = range(1000, 40000)
"""Ordinary tokens of SmolLM2, from which the prompt is drawn."""
CONTEXT = 2048
"""Tokens that llama.cpp has room for, prompt and answer together."""
Measure = Callable[[list[int], int], tuple[float, float]]
"""Takes a prompt's tokens and a number of tokens to generate; returns the seconds of prefill and of decode."""


def with_torch(model: Any) -> Measure:
    import torch

    @torch.inference_mode()
    def measure(prompt: list[int], generated: int) -> tuple[float, float]:
        start = time.perf_counter()
        output = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        prefill, start = time.perf_counter() - start, time.perf_counter()
        for _ in range(generated):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return prefill, time.perf_counter() - start

    return measure


def sqft(path: str, threads: int) -> Measure:
    import torch

    from sqft.checkpoints.model_spec import ModelSpec
    from sqft.tools.serving import load_merged_for_serving

    torch.set_num_threads(threads)
    return with_torch(load_merged_for_serving(ModelSpec(Path(path))))


def transformers(path: str, threads: int) -> Measure:
    """Floats, or codes where gptqmodel is installed, which then chooses its kernel."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    return with_torch(AutoModelForCausalLM.from_pretrained(path, device_map="cpu", dtype=torch.bfloat16).eval())


def llama_cpp(path: str, threads: int) -> Measure:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx = path, CONTEXT
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(parameters)

    def measure(prompt: list[int], generated: int) -> tuple[float, float]:
        # The first token comes with the prompt's logits: no pass of its own.
        request = {"prompt": prompt, "n_predict": generated + 1, "temperature": 0, "cache_prompt": False}
        timings = server.handle_completions(request | {"ignore_eos": True})["timings"]
        assert (timings["prompt_n"], timings["predicted_n"]) == (len(prompt), generated + 1), timings
        return timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000

    return measure


def onnxruntime(path: str, threads: int) -> Measure:
    import onnxruntime_genai as genai

    settings = genai.Config(path)
    settings.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(settings)

    def measure(prompt: list[int], generated: int) -> tuple[float, float]:
        parameters = genai.GeneratorParams(model)
        length = len(prompt) + generated + 2
        parameters.set_search_options(min_length=length, max_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()  # from the prompt's logits: no pass of its own
        prefill, start = time.perf_counter() - start, time.perf_counter()
        for _ in range(generated):
            generator.generate_next_token()
        return prefill, time.perf_counter() - start

    return measure


def openvino(path: str, threads: int) -> Measure:
    import numpy
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    pipeline = genai.LLMPipeline(path, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)

    def measure(prompt: list[int], generated: int) -> tuple[float, float]:
        settings = genai.GenerationConfig()
        settings.do_sample, settings.apply_chat_template, settings.ignore_eos = False, False, True
        settings.max_new_tokens = generated + 1
        ids = numpy.array([prompt], dtype=numpy.int64)
        found = pipeline.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(numpy.ones_like(ids))), settings)
        figures = found.perf_metrics
        return figures.get_ttft().mean / 1000, generated * figures.get_tpot().mean / 1000

    return measure


PROGRAMS: dict[str, Callable[[str, int], Measure]] = {
    "sqft": sqft,
    "transformers": transformers,
    "gptqmodel": transformers,
    "llama.cpp": llama_cpp,
    "ONNX Runtime GenAI": onnxruntime,
    "OpenVINO GenAI": openvino,
}


def main(program: str, path: str, prompt: str, generated: str, threads: str) -> None:
    os.environ |= {"OMP_NUM_THREADS": threads, "GPTQMODEL_CPU_WORKERS": threads}
    measure = PROGRAMS[program](path, int(threads))
    tokens = random.Random(0).choices(TOKENS, k=int(prompt))
    measure(random.Random(1).choices(TOKENS, k=32), 8)  # another text: some programs remember how one begins
    prefill, decode = measure(tokens, int(generated))
    status = Path("/proc/self/status").read_text()  # resource.getrusage would count the parent's memory, too
    memory = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    print(json.dumps({"prefill": int(prompt) / prefill, "decode": int(generated) / decode, "memory": memory}))


if __name__ == "__main__":
    main(*sys.argv[1:])
