{{/* Names and labels. */}}

{{- define "expo.name" -}}
{{- default .Chart.Name .Values.nameOverride -}}
{{- end }}

{{- define "expo.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains (include "expo.name" .) .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "expo.name" .) -}}
{{- end -}}
{{- end }}

{{- define "expo.selectorLabels" -}}
app.kubernetes.io/name: {{ include "expo.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{/* Labels of objects. Not of pods: a chart's new version must not restart a pod whose template is the same. */}}
{{- define "expo.labels" -}}
{{ include "expo.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Labels of one variant's objects: dict root, variant. */}}
{{- define "expo.variantLabels" -}}
{{ include "expo.labels" .root }}
app.kubernetes.io/component: server
expo-serve/variant: {{ .variant.name | quote }}
expo-serve/alpha: {{ .variant.alphaLabel | quote }}
{{- end }}

{{- define "expo.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "expo.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{/* An image's reference from a map of repository, tag, digest: dict root, image. */}}
{{- define "expo.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end }}
