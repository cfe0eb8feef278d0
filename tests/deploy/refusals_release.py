"""Values of a whole release that must not render, as those of variants in ``refusals.py``."""

from __future__ import annotations

from tests.deploy.refusals import Case, _a, _ab

RELEASE: dict[str, Case] = {
    "one-port-for-both": ({"service": {"port": 9000}}, ("status.port", "9000", "service.port", "null")),
    "one-port-for-both-said": ({"status": {"port": 8000}}, ("status.port", "8000", "service.port", "null")),
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
