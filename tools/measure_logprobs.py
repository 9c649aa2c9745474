"""Peak memory of log-probs and entropies with gradients, chunked against dense, for [4, 2048] tokens at Llama-3's
vocabulary: `measure_logprobs.py [--tokens 8192] [--vocab 128256]`. The dense version needs about 17 GB."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time

HIDDEN = 64


def measure(kind: str, tokens: int, vocab: int, chunk: int, answer) -> None:
    """Peak resident bytes above those before the computation, and its seconds."""
    import torch
    import torch.distributed as dist

    from nrt_megatron.mcore.logprobs import token_log_probs

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    hidden, weight = (torch.randn(n, HIDDEN, requires_grad=True) for n in (tokens, vocab))
    targets, scale = torch.randint(0, vocab, (tokens,)), torch.ones(tokens)
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if kind == "chunked":
        group = dist.group.WORLD
        log_probs, entropies = token_log_probs(
            hidden, weight, targets, scale, vocab_size=vocab, group=group, chunk_size=chunk
        )
    else:
        all_log_probs = torch.log_softmax(hidden @ weight.t(), dim=-1)
        log_probs = all_log_probs.gather(1, targets[:, None])
        entropies = -(all_log_probs.exp() * all_log_probs).sum(-1)
    (log_probs.sum() + entropies.sum()).backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    answer.put((kind, peak * 1024, time.perf_counter() - started))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4 * 2048)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--chunk", type=int, default=512)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found = {}
    for kind in ("chunked", "dense"):
        answer = context.Queue()
        worker = context.Process(target=measure, args=(kind, args.tokens, args.vocab, args.chunk, answer))
        worker.start()
        name, peak, seconds = answer.get()
        worker.join()
        found[name] = {"peak_gib": round(peak / 2**30, 3), "seconds": round(seconds, 1)}
    found["ratio"] = round(found["chunked"]["peak_gib"] / found["dense"]["peak_gib"], 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
