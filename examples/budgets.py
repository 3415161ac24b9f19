"""Four ways to say what a prompt may cost, and what is then really spent."""

from autoprune import AutoPrune, Budget, tiny

model, processor = tiny.load()
scene = tiny.draw_scene(seed=1518)
text = tiny.prompt(processor, "how many crosses are there?")
inputs = processor(images=scene.image, text=text, return_tensors="pt")

for budget in (
    Budget.tokens(24),
    Budget.ratio(1 / 6),
    Budget.flops(0.25),
    Budget.kv_bytes(300_000),
):
    with AutoPrune(budget=budget)(model) as trace:
        model(**inputs)
    sample = trace.samples[0]
    print(
        f"{budget!s:48} {sample.mean_tokens:6.2f} of {sample.num_visual} tokens per layer, "
        f"{sample.flops / sample.flops_full:.3f} of the FLOPs, {sample.kv_bytes:,} bytes of KV"
    )
