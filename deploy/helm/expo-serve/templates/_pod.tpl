{{/* The pod template of one variant: dict root, variant, role (single, leader, worker). */}}
{{- define "expo.podTemplate" -}}
{{- $v := .variant -}}
metadata:
  labels:
    {{- with $v.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- toYaml $v.selector | nindent 4 }}
    app.kubernetes.io/component: server
    expo-serve/alpha: {{ $v.alphaLabel | quote }}
  annotations:
    {{- with $v.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    kubectl.kubernetes.io/default-container: server
    expo-serve/alpha: {{ $v.alpha | quote }}
    expo-serve/sources: {{ include "expo.sourcesText" $v | quote }}
spec:
  {{- include "expo.podSpec" . | nindent 2 }}
{{- end }}

{{/* What is served, for people: `base=org/name@commit aligned=/models/a`. */}}
{{- define "expo.sourcesText" -}}
{{- $v := . -}}
{{- $parts := list -}}
{{- range $side := list "base" "aligned" "delta" -}}
{{- with get $v $side -}}
{{- $revision := get $v (printf "%sRevision" $side) -}}
{{- $parts = append $parts (printf "%s=%s%s" $side . ($revision | empty | ternary "" (printf "@%s" $revision))) -}}
{{- end -}}
{{- end -}}
{{- join " " $parts -}}
{{- end }}

{{- define "expo.podSpec" -}}
{{- $v := .variant -}}
serviceAccountName: {{ include "expo.serviceAccountName" .root | quote }}
automountServiceAccountToken: false
# A Service per variant would put its address into every pod's environment, under names that start with EXPO_.
enableServiceLinks: false
{{- include "expo.podSecurity" .root }}
terminationGracePeriodSeconds: {{ $v.graceSeconds }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with $v.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $v.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $v.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml $v.topologySpreadConstraints | nindent 2 }}
{{- else if and (eq .role "single") (or $v.autoscaled (gt (int64 $v.replicas) 1)) }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- toYaml $v.selector | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
{{- end }}
{{- include "expo.waitForWeights" . }}
containers:
  - name: server
    image: {{ include "expo.image" (dict "root" .root "image" $v.image) | quote }}
    imagePullPolicy: {{ $v.image.pullPolicy }}
    {{- include "expo.command" . | nindent 4 }}
    env:
      {{- include "expo.env" . | nindent 6 }}
    {{- if ne .role "worker" }}
    ports:
      - name: http
        containerPort: {{ int64 .root.Values.service.port }}
      {{- with .root.Values.status.port }}
      - name: status
        containerPort: {{ int64 . }}
      {{- end }}
    {{- include "expo.probes" . | nindent 4 }}
    {{- end }}
    {{- include "expo.preStop" . | nindent 4 }}
    # The command's last line says why it ended.
    terminationMessagePolicy: FallbackToLogsOnError
    securityContext:
      {{- include "expo.containerSecurity" .root | nindent 6 }}
    resources:
      {{- include "expo.resources" $v | nindent 6 }}
    volumeMounts:
      {{- include "expo.volumeMounts" . | nindent 6 }}
volumes:
  {{- include "expo.volumes" . | nindent 2 }}
{{- end }}

{{/*
The probes of a pod that answers requests. The status port answers also where the server has no time to, and says live while
a pod drains. A hang is no matter of liveness there: the command itself ends a server whose engine does not answer.
*/}}
{{- define "expo.probes" -}}
{{- $v := .variant -}}
{{- $status := .root.Values.status.port -}}
{{- $url := printf "http://127.0.0.1:%d" (int64 (default .root.Values.service.port $status)) -}}
startupProbe:
  httpGet: {{ empty $status | ternary "{path: /health, port: http}" "{path: /ready, port: status}" }}
  periodSeconds: {{ int64 $v.startup.periodSeconds }}
  timeoutSeconds: {{ int64 $v.startup.periodSeconds }}
  failureThreshold: {{ ceil (divf (int64 $v.startup.budgetSeconds) (int64 $v.startup.periodSeconds)) | int64 }}
readinessProbe:
  exec:
    command:
      {{- include "expo.probe" (dict "url" $url "variant" $v "state" $status) | nindent 6 }}
  {{- include "expo.probeTimes" $v.readiness | nindent 2 }}
livenessProbe:
  httpGet: {{ empty $status | ternary "{path: /health, port: http}" "{path: /live, port: status}" }}
  {{- include "expo.probeTimes" $v.liveness | nindent 2 }}
{{- end }}

{{- define "expo.probeTimes" -}}
periodSeconds: {{ int64 .periodSeconds }}
timeoutSeconds: {{ int64 .timeoutSeconds }}
failureThreshold: {{ int64 .failureThreshold }}
{{- end }}

{{/* The pause in which proxies learn that the pod is going. Clusters before 1.30 have no sleep of their own. */}}
{{- define "expo.preStop" -}}
{{- /* A worker ends at once when it is told to, and the leader's requests with it: so it is told after their time. */ -}}
{{- $seconds := int64 (eq .role "worker" | ternary .variant.drainSeconds .variant.drain.preStopSeconds) -}}
{{- if $seconds -}}
lifecycle:
  preStop:
    {{- if semverCompare ">=1.30-0" .root.Capabilities.KubeVersion.Version }}
    sleep: {seconds: {{ $seconds }}}
    {{- else }}
    exec: {command: [sleep, {{ $seconds | quote }}]}
    {{- end }}
{{- end -}}
{{- end }}

{{- define "expo.env" -}}
{{- $v := .variant -}}
- {name: HOME, value: /home/expo}
# A user id that the cluster chose has no entry in /etc/passwd to be looked up.
- {name: USER, value: expo}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: VLLM_CACHE_ROOT, value: /cache/vllm}
- {name: TRITON_CACHE_DIR, value: /cache/triton}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /cache/torchinductor}
- {name: NUMBA_CACHE_DIR, value: /cache/numba}
{{- if eq $v.device "gpu" }}
# Both would fill HOME.
- {name: CUDA_CACHE_PATH, value: /cache/nv}
- {name: FLASHINFER_WORKSPACE_BASE, value: /cache}
{{- end }}
- {name: HF_HUB_OFFLINE, value: "1"}
- {name: HF_HUB_CACHE, value: {{ .root.Values.weights.mountPath }}/hub}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
{{- if eq $v.device "cpu" }}
- {name: VLLM_CPU_KVCACHE_SPACE, value: {{ int64 $v.memory.kvCacheGiB | quote }}}
{{- end }}
{{- with include "expo.apiKey" .root }}
{{ . }}
{{- end }}
{{- if gt (int64 $v.nodes) 1 }}
- name: VLLM_HOST_IP
  valueFrom:
    fieldRef: {fieldPath: status.podIP}
{{- end }}
{{- with $v.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The API key of the server and of who asks it, or nothing. */}}
{{- define "expo.apiKey" -}}
{{- with .Values.apiKey -}}
{{- if .existingSecret -}}
- name: VLLM_API_KEY
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .key | quote }}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Where a pod beside the servers may run: a map with the keys of a variant. */}}
{{- define "expo.placement" -}}
{{- range $key, $value := pick . "nodeSelector" "tolerations" "affinity" }}
{{- if $value }}
{{ $key }}:
  {{- toYaml $value | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}
