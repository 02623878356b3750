"""A steered model for many users at once, over HTTP in OpenAI's shape.

From the inside out: `engines.llama.batching` completes many requests in one batch, `scheduler` feeds it in a
thread of its own, `service` turns HTTP bodies into requests, `app` and its parts speak HTTP.
"""
