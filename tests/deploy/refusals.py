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
RELEASE: dict[str, Case] = {
    "two-volumes": (
        {"weights": {"volume": {"hostPath": "/srv"}}},
        ("weights.volume", "existingClaim", "hostPath", "leave all but one out"),
    ),
    "download-without-volume": (
        {"weights": {"volume": {"existingClaim": ""}, "download": {"enabled": True}}},
        ("weights.download.enabled", "volume", "existingClaim"),
    ),
    "download-onto-csi": (
        {"weights": {"volume": {"existingClaim": "", "csi": {"driver": "x"}}, "download": {"enabled": True}}},
        ("weights.download.enabled", "volume", "existingClaim"),
    ),
    "hook-before-its-claim": (
        {
            "weights": {
                "volume": {"existingClaim": "", "claim": {"create": True}},
                "download": {"enabled": True, "mode": "hook"},
            }
        },
        ("weights.download.mode", "hook", "claim"),
    ),
    "download-onto-read-only": (
        {
            "weights": {
                "volume": {"existingClaim": "", "claim": {"create": True, "accessModes": ["ReadOnlyMany"]}},
                "download": {"enabled": True},
            }
        },
        ("weights.volume.claim.accessModes", "write", "ReadWriteMany"),
    ),
    "endpoint": ({"weights": {"download": {"endpoint": "ftp://hub"}}}, ("/weights/download/endpoint", "ftp://hub")),
    "relative-mount": ({"weights": {"mountPath": "models"}}, ("/weights/mountPath", "models")),
    "mount-over-the-chart's": (
        {"defaults": {"base": "/cache/b", "aligned": "/cache/a"}, "weights": {"mountPath": "/cache"}},
        ("weights.mountPath", "/cache"),
    ),
    "both-monitors": (
        {"monitoring": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}},
        ("podMonitor and serviceMonitor", "twice", "one of them"),
    ),
    "alias-of-nobody": (
        {"alias": {"name": "x", "weights": {"c": 1}}},
        ("alias.weights.c", "no such variant", "found: a"),
    ),
    "alias-without-weight": ({"alias": {"name": "x", "weights": {"a": 0}}}, ("alias.weights", "add up to 0")),
    "alias-without-variants": ({"alias": {"name": "x"}}, ("alias.weights", "add up to 0")),
    "alias-below-zero": ({"alias": {"name": "x", "weights": {"a": -1}}}, ("/alias/weights/a", "-1", "want 0")),
    "alias-over-a-million": (
        {"alias": {"name": "x", "weights": {"a": 1000001}}},
        ("/alias/weights/a", "maximum"),
    ),
    "alias-without-name": ({"alias": {"weights": {"a": 1}}}, ("alias.name", "no name")),
    "alias-is-a-model": (
        {"alias": {"name": "aligned-expo-0.5", "weights": {"a": 1}}},
        ("alias.name", "aligned-expo-0.5", "variants.a"),
    ),
    "route-to-nowhere": ({"route": {"enabled": True}}, ("route.parentRefs", "Gateway")),
    "route-header": (
        {"route": {"enabled": True, "parentRefs": [{"name": "g"}], "alphaHeader": "X Alpha"}},
        ("/route/alphaHeader", "X Alpha"),
    ),
    "route-host": (
        {"route": {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["https://x"]}},
        ("/route/hostnames/0", "https://x"),
    ),
    "route-too-long": (
        {
            "variants": {f"v{number}": {"alpha": str(number)} for number in range(17)},
            "route": {"enabled": True, "parentRefs": [{"name": "g"}]},
        },
        ("route.enabled", "16 rules", "17 variants"),
    ),
    "route-behind-a-wall": (
        {"route": {"enabled": True, "parentRefs": [{"name": "g"}]}},
        ("networkPolicy.gateway", "another namespace"),
    ),
    "ingress-wildcard": ({"ingress": {"enabled": True, "domain": "*.x.org"}}, ("/ingress/domain", "*.x.org")),
    "tls-of-the-server": (_a(extraArgs=["--ssl-keyfile=/k"]), ("variants.a.extraArgs", "--ssl-keyfile", "TLS")),
    "short-flag": (_a(extraArgs=["-n", "2"]), ("variants.a.extraArgs", "--n")),
    "uncounted-gpus": (_a(extraArgs=["-dp=2"]), ("variants.a.extraArgs", "--dp", "resources.limits", "nvidia.com/gpu")),
    "keda-to-zero": (
        _a(autoscaling={"keda": {"enabled": True, "minReplicas": 0}}),
        ("variants.a.autoscaling.keda.minReplicas", "expected 1"),
    ),
    "label-value": (_a(podLabels={"team": "-x-"}), ("variants.a.podLabels.team", "-x-")),
    "privileged-port": ({"service": {"port": 80}}, ("/service/port", "1,024")),
    "same-image-said-twice": (_ab({}, {"image": {"tag": "0.1.0"}, "servedModelNames": ["x"]}), ("variants.b", "image")),
    "defaults-emptied": ({"defaults": {"memory": None}}, ("memory",)),
    "ingress-nowhere": ({"ingress": {"enabled": True}}, ("ingress.domain", "llm.example.com")),
    "ingress-domain": ({"ingress": {"enabled": True, "domain": "http://x"}}, ("/ingress/domain", "http://x")),
}
