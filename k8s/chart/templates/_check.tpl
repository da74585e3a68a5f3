{{/* Checks that a JSON schema cannot express: values that contradict each other. Each message says what to change. Included by rayservice.yaml. */}}

{{- define "manta.check" -}}
{{- include "manta.checkName" . -}}
{{- include "manta.checkModels" . -}}
{{- include "manta.checkGroups" . -}}
{{- include "manta.checkRay" . -}}
{{- include "manta.checkUpgrade" . -}}
{{- include "manta.checkWays" . -}}
{{- end -}}

{{- define "manta.checkName" -}}
{{- $name := include "manta.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$" $name) -}}
{{- fail (printf "the name %q cannot be a RayService's: it must begin with a letter, have only a-z, 0-9 and -, and at most 40 characters; set fullnameOverride" $name) -}}
{{- end -}}
{{- end -}}

{{- define "manta.checkModels" -}}
{{- $values := .Values -}}
{{- if not $values.models -}}
{{- fail "models is empty: name at least one, as k8s/chart/values/qwen2-7b-1gpu.yaml does, or let `manta plan MODEL --gpus 8xH100-80G --emit helm` write it" -}}
{{- end -}}
{{- range list "model" "models" -}}
  {{- if hasKey $values.config . -}}{{- fail (printf "config.%s: models are set in models, beside config; move it there" .) -}}{{- end -}}
{{- end -}}
{{- $groups := dict -}}
{{- range $values.workerGroups -}}
  {{- $_ := set $groups .name . -}}
{{- end -}}
{{- $names := list -}}
{{- $needed := dict -}}
{{- range $values.models -}}
  {{- if has .name $names -}}{{- fail (printf "two models are called %q: give each its own models[].name" .name) -}}{{- end -}}
  {{- $names = append $names .name -}}
  {{- $group := get $groups .workerGroup -}}
  {{- if not $group -}}
    {{- fail (printf "model %q is to run on worker group %q, and there is %s: set models[].workerGroup to one of them or add it to workerGroups" .name .workerGroup (ternary (printf "only %s" (keys $groups | sortAlpha | join ", ")) "none" (gt (len $groups) 0))) -}}
  {{- end -}}
  {{- include "manta.checkLayout" (dict "root" $ "model" . "group" $group) -}}
  {{- $name := .name -}}
  {{- range compact (list .source .adapter) -}}
    {{- if and (hasPrefix "pvc://" .) (not (regexMatch "^pvc://[a-z0-9][-a-z0-9.]*(/[^/]+)*$" .)) -}}
      {{- fail (printf "model %q: %q is no claim and folder; write pvc://CLAIM/FOLDER" $name .) -}}
    {{- end -}}
  {{- end -}}
  {{- if and .adapterRevision (not .adapter) -}}{{- fail (printf "model %q: adapterRevision is set, and there is no adapter" .name) -}}{{- end -}}
  {{- $sizes := include "manta.sizes" (dict "root" $ "model" .) | fromYaml -}}
  {{- $_ := set $needed .workerGroup (addf (get $needed .workerGroup | default 0.0) (mulf $sizes.gpus $sizes.least)) -}}
{{- end -}}
{{- range $name, $gpus := $needed -}}
  {{- $group := get $groups $name -}}
  {{- $there := mul ($group.max | default 0) ($group.gpusPerHost | default 0) ($group.hostsPerReplica | default 1) | int -}}
  {{- if and ($group.gpusPerHost | default 0) (gt $gpus (float64 $there)) -}}
    {{- fail (printf "the models of worker group %q need %v GPUs for their replicas.min together, and it grows to %d: raise workerGroups[].max, lower replicas.min or give a model a group of its own" $name $gpus $there) -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{/* Of a model, as its entry in ServeConfig has it, what settings say over what the chart derives included: tensor; gpus of a replica, which may
be parts; least replicas. */}}
{{- define "manta.sizes" -}}
{{- $entry := include "manta.modelEntry" . | fromYaml -}}
{{- $parallel := $entry.parallel | default dict -}}
{{- $ranks := mul ($parallel.tensor | default 1) ($parallel.pipeline | default 1) ($parallel.data | default 1) -}}
{{- $device := dig "runner" "device" (dig "runner" "device" "auto" .root.Values.config) $entry -}}
tensor: {{ $parallel.tensor | default 1 | int }}
gpus: {{ ternary 0.0 (mulf $ranks $entry.resources.gpus) (eq $device "cpu") }}
least: {{ ternary (int $entry.replicas.min) 1 (hasKey $entry.replicas "min") }}
{{- end -}}

{{/* Check that a replica fits on the hosts of its worker group. */}}
{{- define "manta.checkLayout" -}}
{{- $sizes := include "manta.sizes" . | fromYaml -}}
{{- $tensor := int $sizes.tensor -}}
{{- $gpus := .group.gpusPerHost | default 0 | int -}}
{{- $hosts := .group.hostsPerReplica | default 1 | int -}}
{{- if and (gt $gpus 0) (gt (float64 $sizes.gpus) (float64 (mul $gpus $hosts))) -}}
{{- fail (printf "model %q needs %v GPUs (tensor x pipeline x data), and a replica of worker group %q has %d (gpusPerHost %d x hostsPerReplica %d): raise hostsPerReplica or choose another layout with `manta plan`" .model.name $sizes.gpus .group.name (mul $gpus $hosts) $gpus $hosts) -}}
{{- end -}}
{{- if and (gt $hosts 1) (gt $gpus 0) (gt $tensor $gpus) (gt (float64 $sizes.gpus) 0.0) -}}
{{- fail (printf "model %q: tensor parallelism of %d leaves the host, which has %d GPUs: set parallel.tensor to %d at most and use parallel.pipeline across hosts" .model.name $tensor $gpus $gpus) -}}
{{- end -}}
{{- $replicas := .model.replicas | default dict -}}
{{- $min := ternary ($replicas.min | int) 1 (hasKey $replicas "min") -}}
{{- $max := ternary ($replicas.max | int) (max $min 1) (hasKey $replicas "max") | int -}}
{{- if gt $min $max -}}
{{- fail (printf "model %q: replicas.min is %d and replicas.max %d: min must not exceed max" .model.name $min $max) -}}
{{- end -}}
{{- if hasKey $replicas "initial" -}}
{{- if or (lt (int $replicas.initial) $min) (gt (int $replicas.initial) $max) -}}
{{- fail (printf "model %q: replicas.initial is %d, which is not between min %d and max %d" .model.name (int $replicas.initial) $min $max) -}}
{{- end -}}
{{- end -}}
{{- $needed := mulf $sizes.gpus $sizes.least -}}
{{- $there := mul (.group.max | default (.group.min | default 0)) $gpus $hosts | int -}}
{{- if and (gt $gpus 0) (gt $needed (float64 $there)) -}}
{{- fail (printf "model %q needs %v GPUs for its %d replicas, and worker group %q grows to %d: raise workerGroups[].max or lower replicas.min" .model.name $needed (int $sizes.least) .group.name $there) -}}
{{- end -}}
{{- end -}}

{{- define "manta.checkGroups" -}}
{{- $autoscaler := .Values.ray.autoscaler.enabled -}}
{{- $names := list "front" "headgroup" -}}
{{- range .Values.workerGroups -}}
  {{- if has .name $names -}}{{- fail (printf "a worker group cannot be called %q: the name is taken; choose another workerGroups[].name" .name) -}}{{- end -}}
  {{- $names = append $names .name -}}
  {{- $min := .min | default 0 | int -}}
  {{- $max := ternary (int .max) $min (hasKey . "max") -}}
  {{- if gt $min $max -}}{{- fail (printf "worker group %q: min is %d and max %d: min must not exceed max" .name $min $max) -}}{{- end -}}
  {{- if and (not $autoscaler) (ne $min $max) -}}
    {{- fail (printf "worker group %q: min %d and max %d differ, and without ray.autoscaler.enabled nothing would change the number: make them equal or enable the autoscaler" .name $min $max) -}}
  {{- end -}}
  {{- if and (not $autoscaler) (hasKey . "idleTimeoutSeconds") -}}
    {{- fail (printf "worker group %q: idleTimeoutSeconds is the autoscaler's, and ray.autoscaler.enabled is false: leave it out or enable the autoscaler" .name) -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{- define "manta.checkRay" -}}
{{- $values := .Values -}}
{{- if and (eq $values.ray.auth.mode "token") (not (semverCompare ">=2.52.0-0" $values.ray.version)) -}}
{{- fail (printf "ray.auth.mode is token, which Ray %s does not know: use Ray 2.52 or newer" $values.ray.version) -}}
{{- end -}}
{{- $tolerance := $values.ray.gcsFaultTolerance -}}
{{- if and (eq $tolerance.backend "redis") (not (regexMatch "^.+:[0-9]+$" $tolerance.redis.address)) -}}
{{- fail "ray.gcsFaultTolerance.backend is redis: set ray.gcsFaultTolerance.redis.address to its host:port" -}}
{{- end -}}
{{- if and (ne $tolerance.backend "redis") (or $tolerance.redis.address $tolerance.redis.password) -}}
{{- fail (printf "ray.gcsFaultTolerance.redis is set, and backend is %s: set backend to redis or leave redis out" $tolerance.backend) -}}
{{- end -}}
{{- range concat $values.env (include "manta.groupEnv" . | fromYamlArray) -}}
  {{- if has .name (list "REDIS_PASSWORD" "REDIS_USERNAME" "RAY_REDIS_ADDRESS" "RAY_gcs_storage" "RAY_gcs_storage_path") -}}
    {{- fail (printf "env has %s, which KubeRay sets by itself: use ray.gcsFaultTolerance" .name) -}}
  {{- end -}}
  {{- if has .name (list "RAY_AUTH_MODE" "RAY_AUTH_TOKEN" "RAY_AUTH_TOKEN_PATH") -}}
    {{- fail (printf "env has %s, which KubeRay sets by itself: use ray.auth" .name) -}}
  {{- end -}}
  {{- if eq .name "RAY_enable_autoscaler_v2" -}}
    {{- fail "env has RAY_enable_autoscaler_v2: the chart always uses version 2; leave it out" -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{- define "manta.groupEnv" -}}
{{- $env := list -}}
{{- range .Values.workerGroups -}}{{- $env = concat $env (.env | default list) -}}{{- end -}}
{{- toYaml $env -}}
{{- end -}}

{{- define "manta.checkUpgrade" -}}
{{- $values := .Values -}}
{{- $delay := $values.upgrade.deletionDelaySeconds -}}
{{- if and (not (kindIs "invalid" $delay)) (lt (int $delay) (int $values.longestStreamSeconds)) -}}
{{- fail (printf "upgrade.deletionDelaySeconds is %d, and a stream may take longestStreamSeconds %d: the old cluster would end under it; raise the one or lower the other" (int $delay) (int $values.longestStreamSeconds)) -}}
{{- end -}}
{{- if eq $values.upgrade.strategy "NewClusterWithIncrementalUpgrade" -}}
  {{- with $values.upgrade.incremental -}}
    {{- if not .gatewayClassName -}}{{- fail "the incremental upgrade shifts traffic by a Gateway: set upgrade.incremental.gatewayClassName" -}}{{- end -}}
    {{- if gt (int .stepSizePercent) (int .maxSurgePercent) -}}
      {{- fail (printf "upgrade.incremental.stepSizePercent is %d and maxSurgePercent %d: a step must not be larger than the surge" (int .stepSizePercent) (int .maxSurgePercent)) -}}
    {{- end -}}
  {{- end -}}
  {{- if not $values.ray.autoscaler.enabled -}}{{- fail "the incremental upgrade needs ray.autoscaler.enabled: enable it or choose another upgrade.strategy" -}}{{- end -}}
{{- end -}}
{{- if and $values.kueue.queueName $values.volcano.queueName -}}
{{- fail "kueue.queueName and volcano.queueName are both set: choose one scheduler" -}}
{{- end -}}
{{- if and $values.kueue.queueName $values.ray.autoscaler.enabled (not $values.kueue.elastic) -}}
{{- fail "Kueue admits a cluster as a whole, and the autoscaler would change it: set kueue.elastic=true (Kueue's gate ElasticJobsViaWorkloadSlices) or ray.autoscaler.enabled=false" -}}
{{- end -}}
{{- end -}}

{{/* Checks of client access, and of where models are stored. */}}
{{- define "manta.checkWays" -}}
{{- $values := .Values -}}
{{- if and $values.ingress.enabled (not $values.ingress.hosts) -}}{{- fail "ingress.enabled: set ingress.hosts to at least one name" -}}{{- end -}}
{{- if and (or $values.gateway.httpRoute.enabled $values.gateway.grpcRoute.enabled) (not $values.gateway.parentRefs) -}}
{{- fail "a route needs a Gateway: set gateway.parentRefs, as [{name: my-gateway}]" -}}
{{- end -}}
{{- if and $values.gateway.inferencePool.enabled (not $values.gateway.inferencePool.endpointPicker.name) -}}
{{- fail "gateway.inferencePool.enabled: set gateway.inferencePool.endpointPicker.name to the picker's Service" -}}
{{- end -}}
{{- if and $values.grpc.tls.clientCertificates (not $values.grpc.tls.secretName) -}}
{{- fail "grpc.tls.clientCertificates needs TLS: set grpc.tls.secretName to a Secret with tls.crt, tls.key and ca.crt" -}}
{{- end -}}
{{- if and (eq $values.cache.download "job") (ne $values.cache.type "pvc") -}}
{{- fail (printf "cache.download is job, and cache.type %s is not shared between pods: use cache.type pvc, or cache.download init" $values.cache.type) -}}
{{- end -}}
{{- range list (list "http" "port" "service.httpPort") (list "grpc" "port" "service.grpcPort") (list "http" "host" "networkPolicy") (list "grpc" "host" "networkPolicy") (list "grpc" "reflection" "grpc.reflection") -}}
  {{- if hasKey (get $values.config (index . 0) | default dict) (index . 1) -}}
    {{- fail (printf "config.%s.%s is fixed inside the pods: use %s" (index . 0) (index . 1) (index . 2)) -}}
  {{- end -}}
{{- end -}}
{{- if and (hasPrefix "/batch/" $values.batch.input) (not $values.batch.claim) -}}
{{- fail "batch.input lies under /batch, where a claim is mounted: set batch.claim" -}}
{{- end -}}
{{- if and $values.batch.input $values.auth.keys.secretName -}}
{{- fail "batch.input: a batch has a cluster of its own, where nobody else asks; leave auth.keys out" -}}
{{- end -}}
{{- if and $values.serviceMonitor.enabled $values.auth.keys.secretName (not $values.serviceMonitor.apiKey.secretName) -}}
{{- fail "serviceMonitor.enabled, and auth.keys asks for a key at /metrics too: set serviceMonitor.apiKey to a Secret with a key of the scope metrics" -}}
{{- end -}}
{{- if hasKey $values.config "fronts" -}}{{- fail "config.fronts follows from front.replicas: set that" -}}{{- end -}}
{{- if hasKey $values.config "ray" -}}{{- fail "config.ray is of a Ray that `manta serve` starts by itself: use ray, head and workerGroups" -}}{{- end -}}
{{- end -}}
