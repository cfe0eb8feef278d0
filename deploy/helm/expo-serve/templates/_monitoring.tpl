{{/* What PodMonitor and ServiceMonitor share. */}}

{{- define "expo.monitorSelector" -}}
matchLabels:
  {{- include "expo.selectorLabels" . | nindent 2 }}
  app.kubernetes.io/component: server
{{- end }}

{{/*
The endpoints: dict root, interval. The server's port answers once it serves; the status port from the start on, and pods that
are not ready are targets too. Alpha comes from the annotation, where it is raw; the operator itself adds `namespace` and
`pod`. Pods that have no such port, as the workers of a group of pods, are not scraped.
*/}}
{{- define "expo.monitorEndpoints" -}}
{{- $interval := .interval -}}
{{- range $port := .root.Values.status.port | empty | ternary (list "http") (list "http" "status") }}
- port: {{ $port }}
  path: /metrics
  interval: {{ $interval }}
  relabelings:
    - {action: replace, sourceLabels: [__meta_kubernetes_pod_label_app_kubernetes_io_instance], targetLabel: release}
    - {action: replace, sourceLabels: [__meta_kubernetes_pod_label_expo_serve_variant], targetLabel: variant}
    - {action: replace, sourceLabels: [__meta_kubernetes_pod_annotation_expo_serve_alpha], targetLabel: alpha}
{{- end }}
{{- end }}
