{{/* How one set of pods follows another. */}}

{{- define "expo.strategy" -}}
{{- if .strategy -}}
{{- toYaml .strategy -}}
{{- else if and (not .autoscaled) (le (int64 .replicas) 1) -}}
type: Recreate
{{- else -}}
type: RollingUpdate
rollingUpdate: {maxSurge: 0, maxUnavailable: 1}
{{- end -}}
{{- end }}

{{/*
A rollout is late when the old pod had its time to drain, the new one its time to wait for the weights and to start, and
five minutes more for scheduling and the image.
*/}}
{{- define "expo.progressDeadlineSeconds" -}}
{{- $v := .variant -}}
{{- $seconds := add (int64 $v.startup.budgetSeconds) $v.graceSeconds 300 -}}
{{- if include "expo.waits" . -}}
{{- $seconds = add $seconds (int64 .root.Values.weights.download.budgetSeconds) -}}
{{- end -}}
{{- $seconds -}}
{{- end }}
