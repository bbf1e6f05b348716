"""``overnight serve``: the project's INT8 model behind OpenAI's protocol, completions and chat, on loopback.

``command`` listens, ``app`` answers. ``completions`` and ``chat`` are one form of request and answer each, ``request``
and ``answer`` what both have. ``engine`` writes the texts of all requests side by side, ``writing`` has it write those
of one. ``guard`` lets requests in, ``refused`` is how one is turned down, ``metrics`` what is counted.
"""

# So many texts are written side by side: more hardly write more in all, and each of them slower.
PARALLEL = 8
