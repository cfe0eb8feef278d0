{{/* Resources of a server's container: what is given, then GPUs and memory by arithmetic. */}}
{{- define "expo.resources" -}}
{{- $requests := deepCopy (default dict .resources.requests) -}}
{{- $limits := deepCopy (default dict .resources.limits) -}}
{{- if eq .device "gpu" -}}
{{- $_ := set $requests .gpuResource (toString (int64 .ranksPerPod)) -}}
{{- $_ := set $limits .gpuResource (toString (int64 .ranksPerPod)) -}}
{{- end -}}
{{- if not $requests.memory -}}
{{- $_ := set $requests "memory" (include "expo.memory" .) -}}
{{- end -}}
{{- if not $limits.memory -}}
{{- $_ := set $limits "memory" $requests.memory -}}
{{- end -}}
{{- $resources := merge (dict "requests" $requests "limits" $limits) .resources -}}
{{- toYaml $resources -}}
{{- end }}

{{/*
Memory of one pod in MiB: processes and load buffers, and on CPU the pod's share of the weights, with each rank's KV cache.
Files are read into small buffers, so that the second checkpoint costs no memory.
*/}}
{{- define "expo.memory" -}}
{{- $ranks := int64 .ranksPerPod -}}
{{- $mebibytes := add (mulf .memory.overheadGiB 1024) (mulf .memory.perRankGiB $ranks 1024) -}}
{{- if eq .device "cpu" -}}
{{- $mebibytes = add $mebibytes (mulf .memory.kvCacheGiB $ranks 1024) (ceil (divf (int64 .memory.weightBytes) 1048576 .nodes)) -}}
{{- end -}}
{{- printf "%dMi" (int64 $mebibytes) -}}
{{- end }}
