"""Ask the embedded model about a picture, at a ninth of its visual tokens."""

from autoprune import AutoPrune, tiny

model, processor = tiny.load()
scene = tiny.draw_scene(seed=1518)
question = tiny.ask(scene, 0, ["shape"])[0]
inputs = processor(
    images=scene.image, text=tiny.prompt(processor, question.text), return_tensors="pt"
)

with AutoPrune(budget=16)(model) as trace:
    ids = model.generate(**inputs, max_new_tokens=8)

answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(question.text, answer.strip())
print(trace.samples[0].tokens_per_layer)
print(trace.summary())
