"""What odd requests are made of: paths, headers, bodies and their values."""

from __future__ import annotations

import json
from typing import Any

OTHER_ALPHAS = (
    b"0.51", b"0", b"-1", b"nan", b"half", b"", b"0.5, 0.5", b"0.5;q=1", b"\xff", b"0x1p-1", b"1e999", b"0 .5",
)  # fmt: skip
SAME_ALPHAS = (b"0.5", b"5e-1", b"+.5", b" 0.50 ", b"0.5000000000000000000001", b"50E-2")
SECRET_ROUTE = "/v1/expo"
"""What only an answer to this route holds is looked for in the answers to smuggled requests."""
MODEL = "fuzz"
PROMPT = "The capital of France is"
_CHAT = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": MODEL, "prompt": PROMPT, "max_tokens": 2, "temperature": 0, "stream": False, "n": 1},
    "/v1/chat/completions": {"model": MODEL, "messages": _CHAT, "max_tokens": 2, "logprobs": False, "stop": ["x"]},
    "/v1/responses": {"model": MODEL, "input": "Hello", "max_output_tokens": 2},
    "/v1/messages": {"model": MODEL, "messages": _CHAT, "max_tokens": 2},
    "/tokenize": {"model": MODEL, "prompt": PROMPT, "add_special_tokens": True},
    "/detokenize": {"model": MODEL, "tokens": [1, 2, 3]},
    "/invocations": {"model": MODEL, "prompt": PROMPT, "max_tokens": 2},
}
"""Bodies that are answered, by route."""
MORE_KEYS: dict[str, tuple[Any, ...]] = {
    "stream": (True, 1, "yes"),
    "echo": (True,),
    "logprobs": (True, 1, 5, 10**6),
    "top_logprobs": (1, 21),
    "prompt_logprobs": (0, 1, -1),
    "logit_bias": ({"1": 1}, {"x": 1}, {"999999": 5}),
    "stop": ("", [""], [1], ["a"] * 300),
    "response_format": ({"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, {"type": "x"}),
    "structured_outputs": ({"regex": "("}, {"choice": []}, {"json": "{"}, {"grammar": "x"}),
    "temperature": (-1, 1e308, 1e-300),
    "top_p": (0, 2),
    "top_k": (-2,),
    "min_p": (2,),
    "seed": (-1, 2**63),
    "max_tokens": (0, -1, 2**63),
    "min_tokens": (5,),
    "n": (0, 3, -1, 10**9),
    "best_of": (2,),
    "presence_penalty": (9,),
    "suffix": ("x",),
    "user": ("\0",),
    "stop_token_ids": ([2**40],),
    "allowed_token_ids": ([], [-1], [2**31]),
    "bad_words": ([""], ["a"]),
    "truncate_prompt_tokens": (-2, 0, 1, 10**6),
    "tools": ([], [{}], [{"type": "function", "function": {"name": "f"}}]),
    "tool_choice": ("auto", "required", {"a": 1}),
    "chat_template": ("{{ 1/0 }}", "{% for i in range(99999999) %}x{% endfor %}"),
    "chat_template_kwargs": ({"a": 1}, []),
    "prompt": ("", [], [[]], [1, 2], [-1], [2**40], [["a"]], ["a"] * 3, None),
    "prompt_embeds": ("x", "AAAA"),
    "messages": ([], [{}], [{"role": "x", "content": None}], [{"role": "user", "content": [{"type": "image_url"}]}]),
    "stream_options": ({"include_usage": True}, {"a": 1}),
    "kv_transfer_params": ({"a": 1},),
    "priority": (5, "x"),
    "add_generation_prompt": (False,),
    "continue_final_message": (True,),
    "vllm_xargs": ({"a": 1}, {"a": []}),
    "cache_salt": ("", "x", 1),
    "model": ("", "x", None, "../x"),
    "return_token_ids": (True,),
    "use_beam_search": (True,),
}
"""Keys of requests with values at the edge, or beyond it."""
ODD_BODIES = (
    b"\xff\xfe",
    b'{"a": "\xff"}',
    b"\xef\xbb\xbf{}",
    b"",
    b" ",
    b"[]",
    b"null",
    b"1",
    b'""',
    b"{",
    b"NaN",
    b"\0" * 64,
)
BODY_KINDS = (b"text/plain", b"multipart/form-data", b"", b"application/json; charset=utf-16")
METHODS = (
    b"GET", b"POST", b"PUT", b"PATCH", b"DELETE", b"HEAD", b"OPTIONS", b"TRACE", b"FOO", b"get", b"PRI", b"M-SEARCH",
)  # fmt: skip
PREFIXES = (
    "", "/", "//", "/.", "/./", "/x/../", "/health/..", "/health/../", "/metrics/..", "/metrics/../", "/health;",
    "/%2e", "/%2e%2e/", "\\", "/health%2f..", "/metrics%2f..", "http://x", "http://x/health?", "http://x:1/", "HTTP://",
    "*", "/health#", "/health?", "/metrics/%2e%2e", "/..;", "/version/..", "http:///", "ftp://x", "/%00", "/%0d%0a",
)  # fmt: skip
SUFFIXES = (
    "", "/", "//", "/.", "/..", "?", "?a=%ff", "#", "%00", "%20", ";a", "/../health", "%2f..%2fhealth", "/health",
    "/%2e%2e/metrics", "\\..\\health", "?x=/health", "#/health", "%0a", "%c0%af", ".json", "?" + "a" * 9000, "/*", "%",
    "%zz",
)  # fmt: skip
HEADERS: tuple[tuple[bytes, bytes], ...] = (
    *((b"Host", host) for host in (b"x/?", b"x/health?", b"health", b"", b"a b", b"127.0.0.1:99999999", b"[::1")),
    *((b"Host", host) for host in (b"\xff", b"x\\@y", b"/health", b"a,b")),
    (b"X-Forwarded-Path", b"/health"),
    (b"X-Forwarded-Prefix", b"/health"),
    (b"X-Original-URL", b"/health"),
    (b"X-Rewrite-URL", b"/health"),
    (b"X-HTTP-Method-Override", b"OPTIONS"),
    (b"Authorization", b"Bearer"),
    (b"Authorization", b"Bearer \xff"),
    (b"Authorization", b"Basic " + b"A" * 64),
    (b"authorization", b"bearer  x"),
    (b"Proxy-Authorization", b"x"),
    (b"Expect", b"100-continue"),
    (b"Cookie", b"a" * 9000),
    (b"X" * 9000, b"y"),
    (b"\xff", b"x"),
    (b"A B", b"x"),
    (b"", b"x"),
    (b"X-Request-Id", b"\x1b[31m"),
    (b"Content-Length", b"-1"),
    (b"Content-Length", b"1e3"),
    (b"Range", b"bytes=0-"),
    (b"Accept-Encoding", b"gzip;q=9"),
    (b"Connection", b"upgrade, keep-alive, x"),
    (b"Origin", b"http://evil"),
    (b"Access-Control-Request-Method", b"GET"),
)
CHUNK_BODY = json.dumps(BODIES["/v1/completions"]).encode()
CHUNK_SIZES = (
    *(size % len(CHUNK_BODY) for size in (b"%x", b"0x%x", b"%X;a=b", b"-%x", b"+%x", b" %x", b"%x ", b"0000000000%x")),
    b"%x;" % len(CHUNK_BODY) + b"a" * 9000, b"ffffffffffffffff", b"", b"zz", b"1", b"7fffffff",
)  # fmt: skip
CHUNK_ENDS = (b"0\r\n", b"0\n", b"00\r\n", b"0;x\r\n", b"", b"0\r\n\r\n0\r\n")
TRAILERS = (
    b"", b"X-Expo-Alpha: 0.9\r\n", b"Authorization: Bearer x\r\n", b"A:" + b"b" * 9000 + b"\r\n", b"\0\r\n",
)  # fmt: skip
CODINGS = (b"chunked", b"chunked, chunked", b"gzip, chunked", b"Chunked", b"xchunked", b"\x0bchunked")
SMUGGLED_NAMES = (
    b"Transfer-Encoding", b"Transfer-Encoding ", b"transfer_encoding", b"Transfer-Encoding\t", b"X\nTransfer-Encoding",
)  # fmt: skip
SMUGGLED_CODINGS = (
    b"chunked", b" chunked", b"chunked\r\nTransfer-Encoding: x", b"x\r\nTransfer-Encoding: chunked", b"\tchunked",
    b"chunked\x0b", b"identity",
)  # fmt: skip
UPGRADES = (b"websocket", b"WebSocket", b"h2c", b"x")
UPGRADE_KEYS = (b"dGhlIHNhbXBsZSBub25jZQ==", b"", b"\xff", b"x" * 9000)
FRAMES = (b"", b"\x81\x85abcd" + b"hello", b"\x88\x80abcd", bytes(range(0x80, 0xA8)))
