"""What `docs/serving.md` shows of the results of [`soak`] and [`profile_plugin`]; needs no vLLM."""

# By the names in the result file, in the page's order.
STEPS = {"words": "words alone", "latents": "a latent in each request", "prompts": "the prompts and their pictures"}


def soak_report(result: dict) -> str:
    """How a soak went, in sentences."""
    counts, memory = result["counts"], result["memory"]
    grown = "; ".join(
        f"{name} {seen['second sixth, MiB']:,.0f} to {seen['last sixth, MiB']:,.0f} MiB"
        for name, seen in memory.items()
    )
    failed = "; ".join(result["failures"]) or "none"
    return (
        f"In {result['minutes']:g} minutes {result['clients']} clients got {counts['answers']:,} whole answers, {counts['streamed']:,} of "
        f"them streamed; {counts['mixed answers']:,} differ from the recorded one. {counts['left']:,} times a client left in the "
        f"middle, {counts['refused']:,} requests were refused, and {counts.get('retried', 0):,} were sent again after status 500. "
        f"Requests were preempted {counts['preemptions']:,} times; {counts['prompt tokens found in the cache']:,} of "
        f"{counts['prompt tokens']:,} tokens of prompts were found in the cache. Memory, from the second sixth of the time to "
        f"the last: {grown}. Failures: {failed}. {measured(result)}"
    )


def profile_table(result: dict) -> str:
    """The plugin's time in a step, by what the step computes."""
    rows = [
        f"| {title} | {step['plugin, µs']:,.0f} | {step['DAC, µs']:,.0f} | {step['step, ms']:,.0f} |"
        for name, title in STEPS.items()
        for step in [result["steps with"][name]]
    ]
    head = "| the step computes | plugin, µs | of it DAC on tensors, µs | whole step, ms |\n|---|---|---|---|\n"
    note = (
        f"Means, {result['requests at a time']} requests at a time, `dac`, the embedded checkpoint. {measured(result)}"
    )
    return head + "\n".join(rows) + "\n\n" + note


def measured(result: dict) -> str:
    machine, versions = result["machine"], result["versions"]
    return (
        f"Measured on {result['date']}: vLLM {versions['vllm']}, torch {versions['torch']}, {machine['processor']}, "
        f"{machine['cores']} cores."
    )
