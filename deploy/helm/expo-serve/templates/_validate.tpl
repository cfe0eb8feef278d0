{{/* What a schema cannot say. Each mistake ends the render with one line: where, what, what to do. */}}
{{- define "expo.validate" -}}
{{- include "expo.validateRelease" . -}}
{{- $variants := include "expo.variants" . | fromJson -}}
{{- range $name, $variant := $variants -}}
{{- $context := dict "root" $ "variant" $variant "own" (index $.Values.variants $name) "at" (printf "variants.%s" $name) -}}
{{- include "expo.validateSources" $context -}}
{{- include "expo.validateVariant" $context -}}
{{- include "expo.validateExtras" $context -}}
{{- end -}}
{{- include "expo.validateUnique" (dict "root" . "variants" $variants) -}}
{{- include "expo.validateAlias" (dict "root" . "variants" $variants) -}}
{{- end }}

{{- define "expo.validateRelease" -}}
{{- $volume := .Values.weights.volume -}}
{{- $volumes := list $volume.existingClaim $volume.claim.create $volume.csi $volume.hostPath | compact -}}
{{- if gt (len $volumes) 1 -}}
{{- fail "weights.volume: more than one of existingClaim, claim.create, csi and hostPath is given; leave all but one out" -}}
{{- end -}}
{{- if .Values.weights.download.enabled -}}
{{- if or (not $volumes) $volume.csi -}}
{{- fail "weights.download.enabled: there is no volume that the download can fill; give weights.volume.existingClaim or weights.volume.claim.create" -}}
{{- end -}}
{{- if gt (len (include "expo.fullname" .)) 46 -}}
{{- fail (printf "fullnameOverride: %q has %d characters, and the download Job's name needs 17 more; at most 46 go" (include "expo.fullname" .) (len (include "expo.fullname" .))) -}}
{{- end -}}
{{- if and (eq .Values.weights.download.mode "hook") $volume.claim.create -}}
{{- fail "weights.download.mode: a hook runs before the release's own claim is made; make the claim first and name it in weights.volume.existingClaim, or use mode job" -}}
{{- end -}}
{{- if and $volume.claim.create (not (has "ReadWriteMany" $volume.claim.accessModes)) (not (has "ReadWriteOnce" $volume.claim.accessModes)) -}}
{{- fail "weights.volume.claim.accessModes: the download must be able to write; expected ReadWriteMany (or ReadWriteOnce on one node)" -}}
{{- end -}}
{{- end -}}
{{- if has .Values.weights.mountPath (include "expo.ownMounts" . | fromJsonArray) -}}
{{- fail (printf "weights.mountPath: %s is mounted for something else; use another path, such as /models" .Values.weights.mountPath) -}}
{{- end -}}
{{- if eq (int64 .Values.service.port) (int64 .Values.status.port) -}}
{{- fail (printf "status.port: %d is service.port too; give one of them another port, or status.port: null for none" (int64 .Values.status.port)) -}}
{{- end -}}
{{- if and .Values.route.enabled (not .Values.route.parentRefs) -}}
{{- fail "route.parentRefs: route.enabled needs the Gateway to attach to; expected [{name: ...}]" -}}
{{- end -}}
{{- $rules := add (len .Values.variants) (empty .Values.alias.name | ternary 0 1) -}}
{{- if and .Values.route.enabled (gt $rules 16) -}}
{{- fail (printf "route.enabled: an HTTPRoute has at most 16 rules, found %d variants and alias; use several releases" $rules) -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.domain) -}}
{{- fail "ingress.domain: ingress.enabled needs the domain below which the variants lie, such as llm.example.com" -}}
{{- end -}}
{{- if and (or .Values.route.enabled .Values.ingress.enabled) .Values.networkPolicy.enabled (not .Values.networkPolicy.gateway) -}}
{{- fail "networkPolicy.gateway: a gateway or ingress controller mostly runs in another namespace, which the policy shuts out; expected its peers, such as [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: gateway}}}], or networkPolicy.enabled: false" -}}
{{- end -}}
{{- end }}

{{/* Paths at which the chart mounts volumes of its own. */}}
{{- define "expo.ownMounts" -}}
{{- list "/cache" "/delta" "/dev/shm" "/home/expo" "/tmp" | toJson -}}
{{- end }}

{{/* Where the weights come from: dict root, variant, own, at. */}}
{{- define "expo.validateSources" -}}
{{- $v := .variant -}}
{{- if and .own.aligned .own.delta -}}
{{- fail (printf "%s: aligned and delta are both given; leave one out" .at) -}}
{{- end -}}
{{- if and $v.aligned $v.delta -}}
{{- fail "defaults: aligned and delta are both given; leave one out" -}}
{{- end -}}
{{- if not $v.base -}}
{{- fail (printf "%s.base: is missing, also from defaults; expected a hub id or an absolute path" .at) -}}
{{- end -}}
{{- if not (or $v.aligned $v.delta) -}}
{{- fail (printf "%s: neither aligned nor delta is given, also not by defaults; give one of them" .at) -}}
{{- end -}}
{{- range $side := list "base" "aligned" "delta" -}}
{{- $source := get $v $side -}}
{{- $revision := get $v (printf "%sRevision" $side) -}}
{{- $context := dict "root" $.root "variant" $v "source" $source "revision" $revision "at" (printf "%s.%s" $.at $side) -}}
{{- if not $source -}}
{{- if $revision -}}{{- fail (printf "%sRevision: is given, but %s is not" $context.at $side) -}}{{- end -}}
{{- else if include "expo.isHub" $source -}}
{{- include "expo.validateHub" $context -}}
{{- else -}}
{{- include "expo.validatePath" $context -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "expo.validateHub" -}}
{{- $exact := regexMatch "^[0-9a-f]{40}$" .revision -}}
{{- if not (or $exact .root.Values.allowMutableRevisions) -}}
{{- fail (printf "%sRevision: the hub id %q needs a commit of 40 hexadecimal digits, found %q; give it, or set allowMutableRevisions" .at .source .revision) -}}
{{- end -}}
{{- if not (include "expo.weightsVolume" (dict "root" .root "readOnly" true)) -}}
{{- fail (printf "%s: the hub id %q needs a volume that holds it, since pods do not reach the hub; give weights.volume, and weights.download.enabled to fill it" .at .source) -}}
{{- end -}}
{{- end }}

{{- define "expo.validatePath" -}}
{{- if .revision -}}
{{- fail (printf "%sRevision: %q is a path, which has no revision; leave it out" .at .source) -}}
{{- end -}}
{{- $mounted := list -}}
{{- if include "expo.weightsVolume" (dict "root" .root "readOnly" true) -}}{{- $mounted = append $mounted .root.Values.weights.mountPath -}}{{- end -}}
{{- if .variant.deltaImage.reference -}}{{- $mounted = append $mounted "/delta" -}}{{- end -}}
{{- range .variant.extraVolumeMounts -}}{{- $mounted = append $mounted .mountPath -}}{{- end -}}
{{- $found := false -}}
{{- range $mounted -}}
{{- if hasPrefix (printf "%s/" (trimSuffix "/" .)) (printf "%s/" $.source) -}}{{- $found = true -}}{{- end -}}
{{- end -}}
{{- if not $found -}}
{{- fail (printf "%s: no volume is mounted at %q; mounted: %s; give weights.volume or extraVolumes" .at .source (join ", " $mounted | default "none")) -}}
{{- end -}}
{{- end }}

{{/* Numbers that must fit each other. */}}
{{- define "expo.validateVariant" -}}
{{- $v := .variant -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $v.name) -}}
{{- fail (printf "%s: the name becomes part of DNS names; expected lower-case letters, digits and hyphens, first a letter, found %q" .at $v.name) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $v.objectName) -}}
{{- fail (printf "%s: the name of its Service would be %q; expected lower-case letters, digits and hyphens, first a letter; set fullnameOverride" .at $v.objectName) -}}
{{- end -}}
{{- if eq $v.name "weights" -}}
{{- fail (printf "%s: the name is taken by the objects of the weights; use another" .at) -}}
{{- end -}}
{{- /* Controllers append a hash, and a LeaderWorkerSet's the number of a group, where 63 characters go. */ -}}
{{- $most := eq (int64 $v.nodes) 1 | ternary 52 48 -}}
{{- if gt (len $v.workloadName) $most -}}
{{- fail (printf "%s: the name of its objects, %q, has %d characters, at most %d go; use a shorter name, or fullnameOverride" .at $v.workloadName (len $v.workloadName) $most) -}}
{{- end -}}
{{- if or (gt (float64 $v.alpha) 10000.0) (lt (float64 $v.alpha) -10000.0) -}}
{{- fail (printf "%s.alpha: expected a decimal from -10000 to 10000, found %q" .at $v.alpha) -}}
{{- end -}}
{{- if and $v.autoscaling.hpa.enabled $v.autoscaling.keda.enabled -}}
{{- fail (printf "%s.autoscaling: hpa and keda are both enabled, and would fight over the number of pods; leave one out" .at) -}}
{{- end -}}
{{- if and $v.autoscaling.keda.enabled (not (int64 $v.autoscaling.keda.minReplicas)) (not $v.autoscaling.keda.triggers) -}}
{{- fail (printf "%s.autoscaling.keda.minReplicas: with 0 pods nothing is left that could wait, so none would come back; expected 1, or triggers that see requests elsewhere" .at) -}}
{{- end -}}
{{- range $kind := list "hpa" "keda" -}}
{{- $scaling := get $v.autoscaling $kind -}}
{{- if and $scaling.enabled (gt (int64 $scaling.minReplicas) (int64 $scaling.maxReplicas)) -}}
{{- fail (printf "%s.autoscaling.%s: minReplicas %d is over maxReplicas %d" $.at $kind (int64 $scaling.minReplicas) (int64 $scaling.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- /* The command needs twenty seconds at most beyond its --shutdown-timeout to end what still runs. */ -}}
{{- if lt (int64 $v.graceSeconds) (int64 (add $v.drainSeconds 20)) -}}
{{- fail (printf "%s.drain.terminationGracePeriodSeconds: %d cuts running requests off; expected at least preStopSeconds + shutdownTimeoutSeconds + 20 = %d" .at (int64 $v.graceSeconds) (int64 (add $v.drainSeconds 20))) -}}
{{- end -}}
{{- if mod (int64 $v.ranks) (int64 $v.nodes) -}}
{{- fail (printf "%s.multiNode.nodes: %d ranks (tensorParallelSize times pipelineParallelSize) do not divide over %d nodes" .at (int64 $v.ranks) (int64 $v.nodes)) -}}
{{- end -}}
{{- if and (gt (int64 $v.nodes) 1) $v.strategy -}}
{{- fail (printf "%s.strategy: a LeaderWorkerSet has none; leave it out where multiNode.nodes is over 1" .at) -}}
{{- end -}}
{{- include "expo.validateDevice" . -}}
{{- if and $v.deltaImage.reference (not (hasPrefix "/delta/" (printf "%s/" $v.delta))) -}}
{{- fail (printf "%s.delta: deltaImage is mounted at /delta; expected a path there, found %q" .at $v.delta) -}}
{{- end -}}
{{- if and $v.deltaImage.reference (not (semverCompare ">=1.33-0" .root.Capabilities.KubeVersion.Version)) -}}
{{- fail (printf "%s.deltaImage: image volumes need Kubernetes 1.33 or later, found %s; put the delta on a volume" .at .root.Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end }}

{{- define "expo.validateDevice" -}}
{{- $v := .variant -}}
{{- $given := default dict $v.resources.requests -}}
{{- if and (eq $v.device "cpu") (not $v.memory.weightBytes) (not $given.memory) -}}
{{- fail (printf "%s.memory.weightBytes: is needed on CPU, where the weights lie in the pod's memory; give memory.weight_bytes of `expo-serve inspect --json`, or resources.requests.memory" .at) -}}
{{- end -}}
{{- if and (eq $v.device "cpu") (gt (int64 $v.nodes) 1) (eq $v.multiNode.executor "ray") -}}
{{- fail (printf "%s.multiNode.executor: vLLM does not run on Ray on CPU; use mp" .at) -}}
{{- end -}}
{{- end }}

{{/* What the chart sets itself must not come in by a side door. */}}
{{- define "expo.validateExtras" -}}
{{- $v := .variant -}}
{{- $ours := list "pair" "base" "base-revision" "aligned" "aligned-revision" "revision" "delta" "delta-revision" "alpha" "alpha-rule" "unmatched" "allow" "allow-links" "allow-pickle-index" "delta-subfolder" "rounding" "rounding-seed" "served-model-name" "port" "status-port" "shutdown-timeout" "engine-timeout" "host" "tensor-parallel-size" "tp" "pipeline-parallel-size" "pp" "nnodes" "n" "node-rank" "r" "master-addr" "headless" "distributed-executor-backend" "model" "load-format" "model-loader-extra-config" "worker-extension-cls" "uds" "config" -}}
{{- range $v.extraArgs -}}
{{- $flag := regexFind "^--?[A-Za-z][A-Za-z_-]*" . | trimAll "-" | replace "_" "-" -}}
{{- if has $flag (list "api-key" "hf-token") -}}
{{- fail (printf "%s.extraArgs: --%s would show a secret in the pod's command line; use apiKey.existingSecret or weights.download.tokenSecret" $.at $flag) -}}
{{- end -}}
{{- if hasPrefix "ssl-" $flag -}}
{{- fail (printf "%s.extraArgs: --%s would make the server speak TLS, which probes and routes do not; let the gateway do that" $.at $flag) -}}
{{- end -}}
{{- $devices := merge (dict) (default dict $v.resources.limits) (default dict $v.resources.requests) -}}
{{- if and (has $flag (list "data-parallel-size" "dp" "prefill-context-parallel-size" "pcp")) (eq $v.device "gpu") (not (get $devices $v.gpuResource)) -}}
{{- fail (printf "%s.extraArgs: --%s needs more GPUs than the chart counts; expected their number in resources.limits, under %s" $.at $flag $v.gpuResource) -}}
{{- end -}}
{{- if has $flag $ours -}}
{{- fail (printf "%s.extraArgs: --%s is set by the chart or by expo-serve; use the chart's own key, or leave it out" $.at $flag) -}}
{{- end -}}
{{- end -}}
{{- $known := list -}}
{{- range include "expo.env" (dict "root" .root "variant" (omit $v "extraEnv")) | fromYamlArray -}}
{{- $known = append $known .name -}}
{{- end -}}
{{- range $v.extraEnv -}}
{{- if and .value (has .name (list "VLLM_API_KEY" "HF_TOKEN" "HUGGING_FACE_HUB_TOKEN")) -}}
{{- fail (printf "%s.extraEnv: %s stands in plain text; use apiKey.existingSecret or weights.download.tokenSecret" $.at .name) -}}
{{- end -}}
{{- if and (eq .name "VLLM_API_KEY") (not .valueFrom) -}}
{{- fail (printf "%s.extraEnv: VLLM_API_KEY is empty, which the server refuses; use apiKey.existingSecret, or leave it out to serve without a key" $.at) -}}
{{- end -}}
{{- if has .name $known -}}
{{- fail (printf "%s.extraEnv: %s is set by the chart, or stands twice; leave it out" $.at .name) -}}
{{- end -}}
{{- $known = append $known .name -}}
{{- end -}}
{{- range $v.extraVolumes -}}
{{- if has .name (list "cache" "home" "tmp" "shm" "weights" "delta") -}}
{{- fail (printf "%s.extraVolumes: %s is the name of a volume of the chart; use another" $.at .name) -}}
{{- end -}}
{{- end -}}
{{- range $label, $value := $v.podLabels -}}
{{- if not (regexMatch "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$" $value) -}}
{{- fail (printf "%s.podLabels.%s: %q is no value of a label; expected at most 63 letters, digits, hyphens, dots" $.at $label $value) -}}
{{- end -}}
{{- if not (regexMatch "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$" $label) -}}
{{- fail (printf "%s.podLabels: %q is no key of a label; expected [PREFIX/]NAME of letters, digits, hyphens, dots" $.at $label) -}}
{{- end -}}
{{- end -}}
{{- range $label := concat (keys $v.selector) (list "app.kubernetes.io/component" "expo-serve/alpha") -}}
{{- if hasKey $v.podLabels $label -}}
{{- fail (printf "%s.podLabels: %s is the chart's own label; leave it out" $.at $label) -}}
{{- end -}}
{{- end -}}
{{- range $annotation := list "expo-serve/alpha" "expo-serve/sources" "kubectl.kubernetes.io/default-container" -}}
{{- if hasKey $v.podAnnotations $annotation -}}
{{- fail (printf "%s.podAnnotations: %s is the chart's own annotation; leave it out" $.at $annotation) -}}
{{- end -}}
{{- end -}}
{{- range $mount := $v.extraVolumeMounts -}}
{{- $taken := include "expo.ownMounts" $.root | fromJsonArray | concat (list $.root.Values.weights.mountPath) -}}
{{- if not $v.deltaImage.reference -}}{{- $taken = without $taken "/delta" -}}{{- end -}}
{{- if has (trimSuffix "/" $mount.mountPath) $taken -}}
{{- fail (printf "%s.extraVolumeMounts: %s is mounted by the chart; use another path" $.at $mount.mountPath) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* No two variants may be taken for each other: dict root, variants. */}}
{{- define "expo.validateUnique" -}}
{{- $names := dict -}}
{{- $contents := dict -}}
{{- range $name, $v := .variants -}}
{{- $image := include "expo.image" (dict "root" $.root "image" $v.image) -}}
{{- $content := list $v.alpha $v.alphaRules $v.unmatched $v.deltaSubfolder $v.rounding $v.roundingSeed (include "expo.sourcesText" $v) $v.deltaImage.reference $image | toJson -}}
{{- with get $contents $content -}}
{{- fail (printf "variants.%s: has the same alpha, sources and image as variants.%s; use replicas for more pods of one" $name .) -}}
{{- end -}}
{{- $_ := set $contents $content $name -}}
{{- with get $names $v.modelName -}}
{{- fail (printf "variants.%s.servedModelNames: the first name %q is also that of variants.%s; give another" $name $v.modelName .) -}}
{{- end -}}
{{- $_ := set $names $v.modelName $name -}}
{{- range $other, $w := $.variants -}}
{{- if and (ne $other $name) (eq $v.workloadName $w.objectName) -}}
{{- fail (printf "variants.%s: its name is that of the LeaderWorkerSet of variants.%s; use another" $other $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The name over several variants: dict root, variants. */}}
{{- define "expo.validateAlias" -}}
{{- $alias := .root.Values.alias -}}
{{- if and $alias.weights (not $alias.name) -}}
{{- fail "alias.name: alias.weights is given, but no name" -}}
{{- end -}}
{{- if $alias.name -}}
{{- $sum := 0 -}}
{{- range $name, $weight := $alias.weights -}}
{{- if not (hasKey $.variants $name) -}}
{{- fail (printf "alias.weights.%s: no such variant; found: %s" $name (keys $.variants | sortAlpha | join ", " | default "none")) -}}
{{- end -}}
{{- $sum = add $sum (int64 $weight) -}}
{{- end -}}
{{- if not $sum -}}
{{- fail "alias.weights: the weights add up to 0; give at least one variant a weight over 0" -}}
{{- end -}}
{{- range $name, $v := .variants -}}
{{- $own := $v.servedModelNames -}}
{{- if hasKey $alias.weights $name -}}{{- $own = initial $own -}}{{- end -}}
{{- if has $alias.name $own -}}
{{- fail (printf "alias.name: %q is also a served name of variants.%s; use another" $alias.name $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
