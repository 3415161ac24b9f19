"""lmms-eval, the evaluation harness: its plugin, and runs of it.

`lmms-eval --model autoprune` finds the plugin by its entry point. Of what is here, `model.py` alone imports
the harness.
"""
