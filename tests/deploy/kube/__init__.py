"""The image, run as the chart says, by podman: `make test-kube`."""
