{{/* The download of hub sources, and how pods wait for it. */}}

{{/* Every hub source of the release once, as JSON list of `id@revision`. */}}
{{- define "expo.downloads" -}}
{{- $sources := list -}}
{{- range include "expo.variants" . | fromJson -}}
{{- range include "expo.hubSources" . | splitList "\n" -}}
{{- with trim . -}}{{- $sources = append $sources . -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- $sources | uniq | sortAlpha | toJson -}}
{{- end }}

{{/* Whether the pods of a variant wait for the download: dict root, variant. Prints true or nothing. */}}
{{- define "expo.waits" -}}
{{- with .root.Values.weights.download -}}
{{- if and .enabled (eq .mode "job") (trim (include "expo.hubSources" $.variant)) -}}true{{- end -}}
{{- end -}}
{{- end }}

{{/* An init container that waits until the Job has marked each of the variant's sources as complete. */}}
{{- define "expo.waitForWeights" -}}
{{- if include "expo.waits" . }}
initContainers:
  - name: wait-for-weights
    image: {{ include "expo.image" (dict "root" .root "image" .variant.image) | quote }}
    imagePullPolicy: {{ .variant.image.pullPolicy }}
    command: [sh, -ec]
    args:
      - {{ .root.Files.Get "files/wait.sh" | quote }}
      - wait
      {{- range include "expo.hubSources" .variant | trim | splitList "\n" }}
      - {{ . | quote }}
      {{- end }}
    env:
      - {name: MODELS, value: {{ .root.Values.weights.mountPath }}}
    securityContext:
      {{- include "expo.containerSecurity" .root | nindent 6 }}
    resources:
      requests: {cpu: 10m, memory: 32Mi}
      limits: {memory: 64Mi}
    volumeMounts:
      - {name: weights, mountPath: {{ .root.Values.weights.mountPath }}, readOnly: true}
{{- end }}
{{- end }}
