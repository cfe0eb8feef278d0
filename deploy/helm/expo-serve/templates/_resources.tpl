{{/* Resources of a server's container: what is given, then GPUs and memory by arithmetic. */}}
{{- define "expo.resources" -}}
{{- $requests := deepCopy (default dict .resources.requests) -}}
{{- $limits := deepCopy (default dict .resources.limits) -}}
{{- if eq .device "gpu" -}}
{{- /* Requests and limits of a device are one number. */ -}}
{{- $gpus := coalesce (get $limits .gpuResource) (get $requests .gpuResource) (int64 .ranksPerPod) | toString -}}
{{- $_ := set $requests .gpuResource $gpus -}}
{{- $_ := set $limits .gpuResource $gpus -}}
{{- end -}}
{{- if and $limits.memory (not $requests.memory) -}}
{{- $_ := set $requests "memory" $limits.memory -}}
{{- end -}}
{{- if not $requests.memory -}}
{{- $_ := set $requests "memory" (include "expo.mebibytes" . | printf "%sMi") -}}
{{- $_ := set $limits "memory" (mulf (include "expo.mebibytes" .) .memory.limitRatio | int64 | printf "%dMi") -}}
{{- else if not $limits.memory -}}
{{- $_ := set $limits "memory" $requests.memory -}}
{{- end -}}
{{- $resources := merge (dict "requests" $requests "limits" $limits) .resources -}}
{{- toYaml $resources -}}
{{- end }}

{{/*
Memory of one pod in MiB: processes and load buffers, and on CPU the pod's share of the weights, with each rank's KV cache.
Files are read into small buffers, so that the second checkpoint costs no memory.
*/}}
{{- define "expo.mebibytes" -}}
{{- $ranks := int64 .ranksPerPod -}}
{{- $gibibytes := addf .memory.overheadGiB (mulf .memory.perRankGiB $ranks) -}}
{{- $weights := 0 -}}
{{- if eq .device "cpu" -}}
{{- $gibibytes = addf $gibibytes (mulf .memory.kvCacheGiB $ranks) -}}
{{- $weights = ceil (divf (int64 .memory.weightBytes) 1048576 .nodes) -}}
{{- end -}}
{{- addf (mulf $gibibytes 1024) $weights | ceil | int64 -}}
{{- end }}
