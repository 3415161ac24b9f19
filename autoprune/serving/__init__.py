"""The OpenAI server: `autoprune serve`. Needs the extra `serve`."""
