{{/*
The variants as the templates use them: defaults, then what the variant says, then what follows from both.
Nothing in one variant depends on another, so that editing one leaves the others' objects as they are.
*/}}

{{/* All variants as JSON, by name. */}}
{{- define "expo.variants" -}}
{{- $variants := dict -}}
{{- range $name, $own := .Values.variants -}}
{{- $_ := set $variants $name (include "expo.variant" (dict "root" $ "name" $name "own" $own) | fromJson) -}}
{{- end -}}
{{- $variants | toJson -}}
{{- end }}

{{/* One variant as JSON: dict root, name, own. */}}
{{- define "expo.variant" -}}
{{- $root := .root -}}
{{- $own := .own -}}
{{- $v := include "expo.merge" (dict "under" $root.Values.defaults "over" $own) | fromJson -}}
{{- /* A variant's source replaces the one of the defaults with its revision: a commit belongs to one repository. */ -}}
{{- range list "base" "aligned" "delta" -}}
{{- if get $own . -}}{{- $_ := set $v (printf "%sRevision" .) (default "" (get $own (printf "%sRevision" .))) -}}{{- end -}}
{{- end -}}
{{- range $side, $other := dict "aligned" "delta" "delta" "aligned" -}}
{{- if and (get $own $side) (not (get $own $other)) -}}
{{- $_ := set $v $other "" -}}
{{- $_ := set $v (printf "%sRevision" $other) "" -}}
{{- if eq $other "delta" -}}{{- $_ := set $v "deltaImage" (dict "reference" "" "pullPolicy" "IfNotPresent") -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- /* Keys of one type of strategy are not allowed beside another type. */ -}}
{{- with $own.strategy -}}{{- $_ := set $v "strategy" . -}}{{- end -}}
{{- $_ := set $v "name" .name -}}
{{- $_ := set $v "objectName" (printf "%s-%s" (include "expo.fullname" $root) .name) -}}
{{- $_ := set $v "alpha" (include "expo.alphaText" (toString $own.alpha)) -}}
{{- $_ := set $v "alphaLabel" ($v.alpha | replace "-" "m") -}}
{{- $_ := set $v "image" (include "expo.merge" (dict "under" $root.Values.image "over" $v.image) | fromJson) -}}
{{- $names := $v.servedModelNames -}}
{{- if not $names -}}
{{- $names = list (printf "%s-expo-%s" (include "expo.shortName" (default $v.delta $v.aligned)) $v.alpha) -}}
{{- end -}}
{{- $_ := set $v "modelName" (first $names) -}}
{{- if and $root.Values.alias.name (hasKey $root.Values.alias.weights .name) -}}
{{- $names = append $names $root.Values.alias.name -}}
{{- end -}}
{{- $_ := set $v "servedModelNames" $names -}}
{{- $selector := include "expo.selectorLabels" $root | fromYaml -}}
{{- $_ := set $v "selector" (set $selector "expo-serve/variant" .name) -}}
{{- $_ := set $v "nodes" (int64 $v.multiNode.nodes) -}}
{{- /* A LeaderWorkerSet's controller makes a headless Service of the set's own name; the variant's Service has another. */ -}}
{{- $_ := set $v "workloadName" (eq (int64 $v.nodes) 1 | ternary $v.objectName (printf "%s-nodes" $v.objectName)) -}}
{{- $_ := set $v "ranks" (mul (int64 $v.tensorParallelSize) (int64 $v.pipelineParallelSize)) -}}
{{- $_ := set $v "ranksPerPod" (div $v.ranks $v.nodes) -}}
{{- $_ := set $v "autoscaled" (or $v.autoscaling.hpa.enabled $v.autoscaling.keda.enabled) -}}
{{- /* A quarter more than the twenty seconds that the command may need beyond --shutdown-timeout. */ -}}
{{- $sum := add (int64 $v.drain.preStopSeconds) (int64 $v.drain.shutdownTimeoutSeconds) -}}
{{- $_ := set $v "graceSeconds" (int64 (default (add $sum 25) $v.drain.terminationGracePeriodSeconds)) -}}
{{- $_ := set $v "drainSeconds" $sum -}}
{{- $v | toJson -}}
{{- end }}

{{/*
Maps merged key by key, everything else replaced: dict under, over; JSON. sprig's mergeOverwrite keeps what lies under a
false, 0 or empty value.
*/}}
{{- define "expo.merge" -}}
{{- $result := deepCopy .under -}}
{{- range $key, $value := .over -}}
{{- $below := get $result $key -}}
{{- if and (kindIs "map" $value) (kindIs "map" $below) $value -}}
{{- $_ := set $result $key (include "expo.merge" (dict "under" $below "over" $value) | fromJson) -}}
{{- else if not (and (kindIs "map" $value) (kindIs "map" $below)) -}}
{{- $_ := set $result $key $value -}}
{{- end -}}
{{- end -}}
{{- $result | toJson -}}
{{- end }}

{{/* Alpha's one text: no plus, no zeros that say nothing (`+00.50` is `0.5`, `-0` is `0`). */}}
{{- define "expo.alphaText" -}}
{{- $sign := hasPrefix "-" . | ternary "-" "" -}}
{{- $parts := regexReplaceAll "^[+-]" . "" | splitList "." -}}
{{- $text := regexReplaceAll "^0+" (first $parts) "" | default "0" -}}
{{- with regexReplaceAll "0+$" (rest $parts | join "") "" -}}{{- $text = printf "%s.%s" $text . -}}{{- end -}}
{{- eq $text "0" | ternary "0" (printf "%s%s" $sign $text) -}}
{{- end }}

{{/* The last part of a source; of a path inside a hub cache, that of its repository. */}}
{{- define "expo.shortName" -}}
{{- $cached := regexFind "models--[^/]+/snapshots/[^/]+/?$" . -}}
{{- $cached | empty | ternary (base .) (regexReplaceAll "/.*" $cached "" | splitList "--" | last) -}}
{{- end }}

{{/* A source on the hub, not a path. Prints true or nothing. */}}
{{- define "expo.isHub" -}}
{{- if and . (not (hasPrefix "/" .)) -}}true{{- end -}}
{{- end }}

{{/* The hub sources of one variant, `id@revision` a line. */}}
{{- define "expo.hubSources" -}}
{{- $variant := . -}}
{{- range list "base" "aligned" "delta" -}}
{{- $source := get $variant . -}}
{{- if include "expo.isHub" $source }}
{{ printf "%s@%s" $source (default "main" (get $variant (printf "%sRevision" .))) }}
{{- end -}}
{{- end -}}
{{- end }}
