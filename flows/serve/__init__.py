"""``overnight serve``: the project's INT8 model behind OpenAI's protocol, completions and chat, on loopback.

``command`` listens, ``app`` answers. ``completions`` and ``chat`` are one form of request and answer each, ``request``
and ``answer`` what both have. ``writing`` writes the texts, one request after another (``turns``). ``refused`` is how a
request is turned down, ``metrics`` what is counted.
"""
