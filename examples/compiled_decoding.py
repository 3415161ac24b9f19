"""Decode with torch.compile: one cache, sized for pruned prompts, and one graph for all pictures."""

import torch

from autoprune import AutoPrune, Budget, tiny

NEW_TOKENS = 4

model, processor = tiny.load()
handle = AutoPrune(Budget.ratio(1 / 6)).attach(model)
cache = handle.static_cache(num_visual=144, num_text=20, max_new_tokens=NEW_TOKENS)
# The default backend makes the step fast; "eager" needs no compiler and shows that one graph is enough.
step = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)


@torch.inference_mode()
def answer(picture, question: str) -> str:
    """A greedy answer; the prefill is pruned and runs as it is, the steps behind it are compiled."""
    text = tiny.prompt(processor, question)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    cache.reset()
    logits = model(**inputs, past_key_values=cache).logits
    words = []
    for _ in range(NEW_TOKENS):
        token = logits[:, -1:].argmax(dim=-1).clone()
        if token == processor.tokenizer.eos_token_id:
            break
        words.append(token.item())
        logits = step(input_ids=token, past_key_values=cache).logits
    return processor.decode(words).strip()


for seed in range(1518, 1522):
    scene = tiny.draw_scene(seed)
    question = tiny.ask(scene, 0, ["shape"])[0]
    print(question.text, answer(scene.image, question.text))
handle.detach()

buffers = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
whole = handle.trace.samples[0].kv_bytes_full
print([layer.max_cache_len for layer in cache.layers], f"{buffers:,} bytes, whole prompt {whole:,}")
