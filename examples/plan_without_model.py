"""What AutoPrune would spend on LLaVA-1.5-7B, from the model's dimensions alone."""

from autoprune import AutoPrune
from autoprune.policy.cost import DecoderCost

cost = DecoderCost(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008)
num_visual, num_text = 576, 71
full = [num_visual] * cost.layers

for budget in (192, 128, 64):
    for bits in (0.1, 1.0):
        plan = AutoPrune(budget=budget).plan(cost.layers, num_visual, bits, num_text)
        flops = cost.prefill_flops(plan, num_text) / cost.prefill_flops(full, num_text)
        cache = cost.kv_bytes(plan, num_text) / cost.kv_bytes(full, num_text)
        print(
            f"budget {budget:3d}, {bits:.1f} bits: layers 0, 1, 16, 31 see "
            f"{plan[0]}, {plan[1]}, {plan[16]}, {plan[31]} visual tokens; "
            f"{1 - flops:.1%} of FLOPs and {1 - cache:.1%} of KV saved"
        )
