{{/* Pod Security "restricted", for every pod of the release. */}}

{{- define "expo.podSecurity" }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ int64 .Values.securityContext.runAsUser }}
  runAsGroup: {{ int64 .Values.securityContext.runAsGroup }}
  fsGroup: {{ int64 .Values.securityContext.fsGroup }}
  # Changing the owner of every file of a checkpoint can take longer than loading it.
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "expo.containerSecurity" -}}
runAsNonRoot: true
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
