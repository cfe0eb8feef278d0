{{/* Volumes of a server's pod, and where they are mounted. */}}

{{- define "expo.volumes" -}}
{{- $v := .variant -}}
- name: cache
  emptyDir: {sizeLimit: {{ $v.scratch.cache }}}
- name: home
  emptyDir: {sizeLimit: {{ $v.scratch.home }}}
- name: tmp
  emptyDir: {sizeLimit: {{ $v.scratch.tmp }}}
# Ranks talk through shared memory, and a container's own is 64 MiB.
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ $v.scratch.shm }}}
{{- with include "expo.weightsVolume" (dict "root" .root "readOnly" true) }}
{{ . }}
{{- end }}
{{- if $v.deltaImage.reference }}
- name: delta
  image:
    reference: {{ $v.deltaImage.reference | quote }}
    pullPolicy: {{ $v.deltaImage.pullPolicy }}
{{- end }}
{{- with $v.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "expo.volumeMounts" -}}
- {name: cache, mountPath: /cache}
- {name: home, mountPath: /home/expo}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
{{- if include "expo.weightsVolume" (dict "root" .root "readOnly" true) }}
- {name: weights, mountPath: {{ .root.Values.weights.mountPath }}, readOnly: true}
{{- end }}
{{- if .variant.deltaImage.reference }}
- {name: delta, mountPath: /delta, readOnly: true}
{{- end }}
{{- with .variant.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The volume of all checkpoints, or nothing: dict root, readOnly. */}}
{{- define "expo.weightsVolume" -}}
{{- with .root.Values.weights.volume -}}
{{- if or .existingClaim .claim.create -}}
- name: weights
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-weights" (include "expo.fullname" $.root)) .existingClaim | quote }}
    {{- if $.readOnly }}
    readOnly: true
    {{- end }}
{{- else if .csi -}}
- name: weights
  csi:
    readOnly: true
    {{- toYaml (omit .csi "readOnly") | nindent 4 }}
{{- else if .hostPath -}}
- name: weights
  hostPath: {path: {{ .hostPath }}, type: Directory}
{{- end -}}
{{- end -}}
{{- end }}
