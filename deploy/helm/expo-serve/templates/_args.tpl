{{/* The command line of one pod: dict root, variant, role (single, leader, worker); a YAML list. */}}
{{- define "expo.args" -}}
{{- $v := .variant -}}
{{- $args := list -}}
{{- range $side := list "base" "aligned" "delta" -}}
{{- with get $v $side -}}{{- $args = append $args (printf "--%s=%s" $side .) -}}{{- end -}}
{{- with get $v (printf "%sRevision" $side) -}}{{- $args = append $args (printf "--%s-revision=%s" $side .) -}}{{- end -}}
{{- end -}}
{{- $args = append $args (printf "--alpha=%s" $v.alpha) -}}
{{- range $v.alphaRules -}}{{- $args = append $args (printf "--alpha-rule=%s" .) -}}{{- end -}}
{{- with $v.unmatched -}}{{- $args = append $args (printf "--unmatched=%s" .) -}}{{- end -}}
{{- range $v.allow -}}{{- $args = append $args (printf "--allow=%s" .) -}}{{- end -}}
{{- range $v.allowLinks -}}{{- $args = append $args (printf "--allow-links=%s" .) -}}{{- end -}}
{{- if $v.allowPickleIndex -}}{{- $args = append $args "--allow-pickle-index" -}}{{- end -}}
{{- with $v.deltaSubfolder -}}{{- $args = append $args (printf "--delta-subfolder=%s" .) -}}{{- end -}}
{{- with $v.rounding -}}{{- $args = append $args (printf "--rounding=%s" .) -}}{{- end -}}
{{- if not (kindIs "invalid" $v.roundingSeed) -}}
{{- $args = append $args (printf "--rounding-seed=%d" (int64 $v.roundingSeed)) -}}
{{- end -}}
{{- $args = concat $args (list "--served-model-name") $v.servedModelNames -}}
{{- $args = append $args (printf "--port=%d" (int64 .root.Values.service.port)) -}}
{{- $args = append $args (printf "--shutdown-timeout=%d" (int64 $v.drain.shutdownTimeoutSeconds)) -}}
{{- /* A worker answers no requests, and its engine nobody but the leader's. */ -}}
{{- if ne .role "worker" -}}
{{- with .root.Values.status.port -}}{{- $args = append $args (printf "--status-port=%d" (int64 .)) -}}{{- end -}}
{{- if not (kindIs "invalid" $v.engineTimeoutSeconds) -}}
{{- $args = append $args (printf "--engine-timeout=%d" (int64 $v.engineTimeoutSeconds)) -}}
{{- end -}}
{{- end -}}
{{- if gt (int64 $v.tensorParallelSize) 1 -}}
{{- $args = append $args (printf "--tensor-parallel-size=%d" (int64 $v.tensorParallelSize)) -}}
{{- end -}}
{{- if gt (int64 $v.pipelineParallelSize) 1 -}}
{{- $args = append $args (printf "--pipeline-parallel-size=%d" (int64 $v.pipelineParallelSize)) -}}
{{- end -}}
{{- if gt (int64 $v.nodes) 1 -}}
{{- if eq $v.multiNode.executor "ray" -}}
{{- $args = append $args "--distributed-executor-backend=ray" -}}
{{- else -}}
{{- /* The LeaderWorkerSet's controller puts these variables first in the container's environment. */ -}}
{{- $rank := eq .role "leader" | ternary "0" "$(LWS_WORKER_INDEX)" -}}
{{- $args = concat $args (list (printf "--nnodes=%d" (int64 $v.nodes)) (printf "--node-rank=%s" $rank) "--master-addr=$(LWS_LEADER_ADDRESS)") -}}
{{- if eq .role "worker" -}}{{- $args = append $args "--headless" -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- concat $args $v.extraArgs | toYaml -}}
{{- end }}

{{/* Command and arguments of a container. Under Ray the cluster is made first, by the same pods. */}}
{{- define "expo.command" -}}
{{- $ray := and (gt (int64 .variant.nodes) 1) (eq .variant.multiNode.executor "ray") -}}
{{- if and $ray (eq .role "worker") -}}
# A worker that ends takes its whole group along, so it waits until the leader's cluster answers.
command: [sh, -ec, 'trap "exit 143" TERM; until ray health-check --address "$LWS_LEADER_ADDRESS:6379"; do sleep 5 & wait $!; done; exec ray start --address="$LWS_LEADER_ADDRESS:6379" --block']
{{- else if $ray -}}
command: [sh, -ec, 'ray start --head --port=6379; exec tini -- expo-serve "$@"', expo-serve]
args:
  {{- include "expo.args" . | nindent 2 }}
{{- else -}}
args:
  {{- include "expo.args" . | nindent 2 }}
{{- end -}}
{{- end }}

{{/* The command that proves served name and alpha: dict url, variant, and state where the status port is asked. */}}
{{- define "expo.probe" -}}
- expo-serve
- probe
{{- if .state }}
- --state
{{- end }}
- {{ printf "--url=%s" .url }}
- {{ printf "--alpha=%s" .variant.alpha }}
- {{ printf "--served-model-name=%s" .variant.modelName | quote }}
{{- end }}
