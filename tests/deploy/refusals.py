"""Values that must not render, each with the words of its one line: where it is, what is there or what is expected."""

from __future__ import annotations

from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"
PAIR = {"base": "/models/base", "aligned": "/models/aligned"}
ONE = {"defaults": PAIR, "weights": {"volume": {"existingClaim": "checkpoints"}}}
"""What each case is laid over; a case brings its variants, or has `a` at 0.5."""
_HUB = {"base": "org/base", "baseRevision": SHA, "aligned": "org/aligned", "alignedRevision": SHA}

Case = tuple[dict[str, Any], tuple[str, ...]]


def _a(**settings: Any) -> dict[str, Any]:
    """One variant, `a`, that says this."""
    return {"variants": {"a": {"alpha": "0.5", **settings}}}


def _ab(a: dict[str, Any], b: dict[str, Any], name: str = "b") -> dict[str, Any]:
    return {"variants": {"a": {"alpha": "0.5", **a}, name: {"alpha": "0.5", **b}}}


NAMES: dict[str, Case] = {
    "upper-case": ({"variants": {"Mild": {"alpha": "0.5"}}}, ("Mild", "lower-case")),
    "underscore": ({"variants": {"a_b": {"alpha": "0.5"}}}, ("a_b", "lower-case")),
    "digit-first": ({"variants": {"5a": {"alpha": "0.5"}}}, ("5a", "letter")),
    "too-long": ({"variants": {"v" * 50: {"alpha": "0.5"}}}, ("v" * 50, "characters", "52")),
    "too-long-for-the-download": (
        {
            "fullnameOverride": "x" * 49,
            "defaults": {"aligned": "org/x", "alignedRevision": SHA},
            "weights": {"download": {"enabled": True}},
        },
        ("fullnameOverride", "x" * 49, "characters"),
    ),
    "taken-by-the-download": (
        {
            "variants": {"weights": {"alpha": "0.5", "aligned": "org/x", "alignedRevision": SHA}},
            "weights": {"download": {"enabled": True}},
        },
        ("variants.weights", "name"),
    ),
    "taken-by-a-group": (
        {
            "variants": {
                "a": {"alpha": "1", "multiNode": {"nodes": 2}, "tensorParallelSize": 2},
                "a-nodes": {"alpha": "2"},
            }
        },
        ("variants.a", "a-nodes"),
    ),
    "fullname-upper-case": ({"fullnameOverride": "Expo"}, ("fullnameOverride", "Expo")),
    "fullname-digit-first": ({"fullnameOverride": "1expo"}, ("fullnameOverride", "1expo")),
    "list": ({"variants": [{"name": "a", "alpha": "0.5"}]}, ("/variants", "got array, want object")),
}
ALPHA: dict[str, Case] = {
    "number": ({"variants": {"a": {"alpha": 0.5}}}, ("/variants/a/alpha", "got number, want string")),
    "exponent": ({"variants": {"a": {"alpha": "1e3"}}}, ("/variants/a/alpha", "1e3")),
    "word": ({"variants": {"a": {"alpha": "half"}}}, ("/variants/a/alpha", "half")),
    "over": ({"variants": {"a": {"alpha": "10001"}}}, ("variants.a.alpha", "10001", "from -10000 to 10000")),
    "barely-over": ({"variants": {"a": {"alpha": "10000.0000000001"}}}, ("variants.a.alpha", "from -10000 to 10000")),
    "under": ({"variants": {"a": {"alpha": "-10000.1"}}}, ("variants.a.alpha", "-10000.1", "from -10000 to 10000")),
    "far-over": ({"variants": {"a": {"alpha": "100000"}}}, ("/variants/a/alpha", "100000")),
    "more-digits-than-a-double": ({"variants": {"a": {"alpha": "9999.99999999999"}}}, ("/variants/a/alpha", "9999.99")),
    "missing": ({"variants": {"a": {}}}, ("/variants/a", "missing property 'alpha'")),
    "in-defaults": ({"defaults": {"alpha": "0.5"}}, ("/defaults", "'alpha' not allowed")),
    "rule-without-value": (_a(alphaRules=["lm_head"]), ("/variants/a/alphaRules/0", "lm_head")),
}
SOURCES: dict[str, Case] = {
    "both-in-variant": (
        _a(aligned="/models/x", delta="/models/y"),
        ("variants.a", "aligned and delta", "leave one out"),
    ),
    "both-in-defaults": ({"defaults": {"delta": "/models/y"}}, ("defaults", "aligned and delta", "leave one out")),
    "neither": ({"defaults": {"aligned": ""}}, ("variants.a", "neither aligned nor delta", "give one")),
    "no-base": ({"defaults": {"base": ""}}, ("variants.a.base", "missing", "hub id or an absolute path")),
    "no-revision": (_a(aligned="org/x"), ("variants.a.alignedRevision", "org/x", "40 hexadecimal")),
    "short-revision": (
        _a(aligned="org/x", alignedRevision="0123456"),
        ("variants.a.alignedRevision", "0123456", "40 hexadecimal"),
    ),
    "branch": (_a(aligned="org/x", alignedRevision="main"), ("variants.a.alignedRevision", "main", "40 hexadecimal")),
    "revision-of-a-path": (_a(aligned="/models/x", alignedRevision=SHA), ("variants.a.alignedRevision", "path")),
    "revision-of-nothing": (_a(deltaRevision=SHA), ("variants.a.deltaRevision", "delta is not")),
    "relative-path": (_a(aligned="./models/x"), ("/variants/a/aligned", "./models/x")),
    "not-mounted": (_a(aligned="/other/x"), ("variants.a.aligned", "/other/x", "/models")),
    "delta-image-missing": (_a(delta="/delta/x"), ("variants.a.delta", "/delta/x", "/models")),
    "image-without-delta": (_a(deltaImage={"reference": "r/d:1"}), ("variants.a.delta", "/delta")),
    "hub-without-volume": (
        {"defaults": _HUB, "weights": {"volume": {"existingClaim": ""}}},
        ("variants.a.base", "org/base", "volume"),
    ),
    "same-twice": (_ab({}, {}), ("variants.b", "variants.a", "same alpha, sources and image")),
    "same-twice-in-other-texts": (_ab({}, {"alpha": "+00.50"}), ("variants.b", "variants.a", "same alpha")),
    "same-said-and-default": (_ab({}, {"aligned": "/models/aligned"}), ("variants.b", "variants.a", "same alpha")),
    "same-but-for-the-rounding": (
        _ab({}, {"rounding": "nearest"}),
        ("variants.b.servedModelNames", "aligned-expo-0.5", "variants.a"),
    ),
    "same-rounding": (
        _ab({"rounding": "dithered", "roundingSeed": 1}, {"rounding": "dithered", "roundingSeed": 1}),
        ("variants.b", "variants.a", "same alpha"),
    ),
    "same-name": (
        _ab({"servedModelNames": ["x"]}, {"alpha": "1", "servedModelNames": ["x", "y"]}),
        ("variants.b.servedModelNames", '"x"', "variants.a"),
    ),
    "same-name-of-another-image": (
        _ab({}, {"image": {"tag": "next"}}),
        ("variants.b.servedModelNames", "aligned-expo-0.5", "variants.a"),
    ),
    "name-with-space": (_a(servedModelNames=["a b"]), ("/variants/a/servedModelNames/0", "a b")),
}
KEYS: dict[str, Case] = {
    "variant": (_a(replica=2), ("/variants/a", "'replica' not allowed")),
    "defaults": ({"defaults": {"replica": 2}}, ("/defaults", "'replica' not allowed")),
    "top": ({"variant": {}}, ("at ''", "'variant' not allowed")),
    "deep": (_a(startup={"budget": 5}), ("/variants/a/startup", "'budget' not allowed")),
    "replicas": (_a(replicas=-1), ("/variants/a/replicas", "-1", "want 0")),
    "device": (_a(device="tpu"), ("/variants/a/device", "'gpu', 'cpu'")),
    "gpu-resource": (_a(gpuResource="gpu"), ("/variants/a/gpuResource", "'gpu'")),
    "quantity": (_a(scratch={"shm": "2 GB"}), ("/variants/a/scratch/shm", "2 GB")),
    "port": ({"service": {"port": 70000}}, ("/service/port", "70,000", "65,535")),
    "status-port": ({"status": {"port": 70000}}, ("/status/port", "70,000", "65,535")),
    "status-port-of-root": ({"status": {"port": 1023}}, ("/status/port", "1,024")),
    "no-status": ({"status": None}, ("missing property 'status'",)),
    "engine-timeout": (_a(engineTimeoutSeconds=-1), ("/variants/a/engineTimeoutSeconds", "-1", "want 0")),
    "stalled": (
        {"monitoring": {"rules": {"loadStalledMinutes": 0}}},
        ("/monitoring/rules/loadStalledMinutes", "want 1"),
    ),
    "root": ({"securityContext": {"runAsUser": 0}}, ("/securityContext/runAsUser", "got 0, want 1")),
    "pull-secrets": ({"imagePullSecrets": ["registry"]}, ("/imagePullSecrets/0", "got string, want object")),
    "peers": ({"networkPolicy": {"gateway": "all"}}, ("/networkPolicy/gateway", "got string, want array")),
    "digest": ({"image": {"digest": "0123"}}, ("/image/digest", "0123", "sha256")),
    "budget": (_a(podDisruptionBudget={"maxUnavailable": "few"}), ("/podDisruptionBudget/maxUnavailable", "few")),
    "unmatched": (_a(unmatched="skip"), ("/variants/a/unmatched", "'refuse', 'copy'")),
    "rounding": (_a(rounding="up"), ("/variants/a/rounding", "'dithered', 'nearest'")),
    "rounding-in-defaults": ({"defaults": {"rounding": "Nearest"}}, ("/defaults/rounding", "'dithered', 'nearest'")),
    "seed-below-zero": (_a(roundingSeed=-1), ("/variants/a/roundingSeed", "-1", "want 0")),
    "seed-over-32-bits": (_a(roundingSeed=2**32), ("/variants/a/roundingSeed", "maximum", "4.294967295")),
    "seed-with-fraction": (_a(roundingSeed=0.5), ("/variants/a/roundingSeed", "want")),
    "seed-as-text": (_a(roundingSeed="7"), ("/variants/a/roundingSeed", "got string")),
    "deviation": (
        {"monitoring": {"rules": {"effectiveAlphaDeviation": 0}}},
        ("/monitoring/rules/effectiveAlphaDeviation", "0"),
    ),
}
RUNNING: dict[str, Case] = {
    "hpa-and-keda": (
        _a(autoscaling={"hpa": {"enabled": True}, "keda": {"enabled": True}}),
        ("variants.a.autoscaling", "hpa and keda", "leave one out"),
    ),
    "fewest-over-most": (
        _a(autoscaling={"hpa": {"enabled": True, "minReplicas": 5}}),
        ("variants.a.autoscaling.hpa", "minReplicas 5", "maxReplicas 4"),
    ),
    "grace": (
        _a(drain={"terminationGracePeriodSeconds": 130}),
        ("variants.a.drain.terminationGracePeriodSeconds", "130", "preStopSeconds", "shutdownTimeoutSeconds"),
    ),
    "cpu-memory": (_a(device="cpu"), ("variants.a.memory.weightBytes", "inspect", "resources.requests.memory")),
    "ranks-over-nodes": (
        _a(multiNode={"nodes": 3}, tensorParallelSize=8),
        ("variants.a.multiNode.nodes", "8 ranks", "3 nodes"),
    ),
    "fewer-ranks-than-nodes": (_a(multiNode={"nodes": 2}), ("variants.a.multiNode.nodes", "1 ranks", "2 nodes")),
    "strategy-of-a-group": (
        _a(multiNode={"nodes": 2}, tensorParallelSize=2, strategy={"type": "Recreate"}),
        ("variants.a.strategy", "LeaderWorkerSet", "leave it out"),
    ),
    "ray-on-cpu": (
        _a(multiNode={"nodes": 2, "executor": "ray"}, tensorParallelSize=2, device="cpu", memory={"weightBytes": 1}),
        ("variants.a.multiNode.executor", "Ray", "mp"),
    ),
    "key-in-arguments": (_a(extraArgs=["--api-key=x"]), ("variants.a.extraArgs", "--api-key", "apiKey.existingSecret")),
    "token-in-arguments": (_a(extraArgs=["--hf_token", "x"]), ("variants.a.extraArgs", "--hf-token", "tokenSecret")),
    "alpha-in-arguments": (_a(extraArgs=["--alpha", "1"]), ("variants.a.extraArgs", "--alpha", "chart")),
    "pair-in-arguments": (_a(extraArgs=["--pair", "x"]), ("variants.a.extraArgs", "--pair", "chart")),
    "rounding-in-arguments": (_a(extraArgs=["--rounding=nearest"]), ("variants.a.extraArgs", "--rounding", "chart")),
    "seed-in-arguments": (_a(extraArgs=["--rounding_seed", "1"]), ("variants.a.extraArgs", "--rounding-seed", "chart")),
    "port-in-arguments": (_a(extraArgs=["--port=1"]), ("variants.a.extraArgs", "--port", "chart")),
    "status-port-in-arguments": (_a(extraArgs=["--status_port=1"]), ("variants.a.extraArgs", "--status-port", "chart")),
    "engine-timeout-in-arguments": (
        _a(extraArgs=["--engine-timeout", "1"]),
        ("variants.a.extraArgs", "--engine-timeout", "chart"),
    ),
    "short-flag": (_a(extraArgs=["-tp=8"]), ("variants.a.extraArgs", "tp", "chart")),
    "key-in-environment": (
        _a(extraEnv=[{"name": "VLLM_API_KEY", "value": "x"}]),
        ("variants.a.extraEnv", "VLLM_API_KEY", "apiKey.existingSecret"),
    ),
    "empty-key-in-environment": (
        _a(extraEnv=[{"name": "VLLM_API_KEY", "value": ""}]),
        ("variants.a.extraEnv", "VLLM_API_KEY is empty", "apiKey.existingSecret"),
    ),
    "environment-of-the-chart": (
        _a(extraEnv=[{"name": "HOME", "value": "/"}]),
        ("variants.a.extraEnv", "HOME", "chart"),
    ),
    "environment-twice": (
        _a(extraEnv=[{"name": "X", "value": "1"}, {"name": "X", "value": "2"}]),
        ("variants.a.extraEnv", "X"),
    ),
    "volume-of-the-chart": (_a(extraVolumes=[{"name": "tmp", "emptyDir": {}}]), ("variants.a.extraVolumes", "tmp")),
    "mount-of-the-chart": (
        _a(extraVolumeMounts=[{"name": "x", "mountPath": "/tmp"}]),
        ("variants.a.extraVolumeMounts", "/tmp", "another path"),
    ),
    "label-of-the-chart": (
        _a(podLabels={"expo-serve/variant": "x"}),
        ("variants.a.podLabels", "expo-serve/variant", "leave it out"),
    ),
}
