{{/* The Ray cluster: head, fronts, GPU hosts. Used by both the RayService and the RayJob. */}}

{{- define "manta.rayCluster" -}}
rayVersion: {{ .Values.ray.version | quote }}
enableInTreeAutoscaling: {{ .Values.ray.autoscaler.enabled }}
{{- if .Values.ray.autoscaler.enabled }}
autoscalerOptions:
  version: v2
  idleTimeoutSeconds: {{ .Values.ray.autoscaler.idleTimeoutSeconds }}
  upscalingMode: {{ .Values.ray.autoscaler.upscalingMode }}
  image: {{ include "manta.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  resources:
    {{- toYaml .Values.ray.autoscaler.resources | nindent 4 }}
  securityContext:
    {{- include "manta.containerSecurity" (dict) | nindent 4 }}
    runAsUser: 10001
    seccompProfile: {type: RuntimeDefault}
  env:
    - {name: HOME, value: /tmp}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
{{- end }}
{{- if eq .Values.ray.auth.mode "token" }}
authOptions:
  mode: token
  {{- with .Values.ray.auth.existingSecret }}
  secretName: {{ . }}
  {{- end }}
{{- end }}
{{- include "manta.gcsFaultTolerance" . }}
headGroupSpec:
  {{- include "manta.head" . | nindent 2 }}
workerGroupSpecs:
  -
    {{- include "manta.front" . | nindent 4 }}
  {{- range .Values.workerGroups }}
  - {{- include "manta.workers" (dict "root" $ "group" .) | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "manta.gcsFaultTolerance" -}}
{{- $tolerance := .Values.ray.gcsFaultTolerance -}}
{{- if eq $tolerance.backend "redis" }}
gcsFaultToleranceOptions:
  redisAddress: {{ $tolerance.redis.address | quote }}
  externalStorageNamespace: {{ include "manta.fullname" . }}
  {{- with $tolerance.redis.username }}
  redisUsername: {value: {{ . | quote }}}
  {{- end }}
  {{- with $tolerance.redis.password }}
  redisPassword:
    valueFrom:
      secretKeyRef:
        {{- include "manta.secretKeyRef" (dict "root" $ "value" . "key" "redis-password") | nindent 8 }}
  {{- end }}
{{- else if eq $tolerance.backend "rocksdb" }}
gcsFaultToleranceOptions:
  backend: rocksdb
  storage:
    {{- with $tolerance.rocksdb }}
    {{- if .existingClaim }}
    claimName: {{ .existingClaim }}
    {{- else }}
    size: {{ .size }}
    {{- with .storageClassName }}
    storageClassName: {{ . }}
    {{- end }}
    {{- end }}
    {{- end }}
{{- end }}
{{- end -}}

{{/* Object store memory in bytes. No tokens or weights pass through it; Ray's default is a third of the pod's memory, in /dev/shm. */}}
{{- define "manta.objectStore" -}}
"268435456"
{{- end -}}

{{/* The head serves no clients and has no room for replicas. Metrics are scraped from its proxy. */}}
{{- define "manta.head" -}}
rayStartParams:
  num-cpus: "0"
  num-gpus: "0"
  dashboard-host: 0.0.0.0
  object-store-memory: {{ include "manta.objectStore" . }}
  block: "true"
template:
  metadata:
    labels:
      {{- include "manta.podLabels" (dict "root" . "role" "head") | nindent 6 }}
    {{- with .Values.head.podAnnotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    {{- if not .Values.ray.autoscaler.enabled }}
    serviceAccountName: {{ include "manta.serviceAccount" . }}
    automountServiceAccountToken: false
    {{- end }}
    terminationGracePeriodSeconds: {{ include "manta.gracePeriod" . }}
    securityContext:
      {{- include "manta.podSecurity" . | nindent 6 }}
    {{- with include "manta.placement" (dict "root" . "place" .Values.head) }}
    {{- . | trim | nindent 4 }}
    {{- end }}
    containers:
      - name: ray-head
        image: {{ include "manta.image" . }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        securityContext:
          {{- include "manta.containerSecurity" (dict) | nindent 10 }}
        ports:
          - {name: gcs-server, containerPort: 6379}
          - {name: dashboard, containerPort: 8265}
          - {name: client, containerPort: 10001}
          - {name: metrics, containerPort: 8080}
          - {name: serve, containerPort: 8000}
        env:
          {{- include "manta.env" . | nindent 10 }}
        resources:
          {{- toYaml .Values.head.resources | nindent 10 }}
        lifecycle:
          {{- include "manta.drain" (dict "root" . "how" "--last") | nindent 10 }}
        volumeMounts:
          {{- include "manta.mounts" . | nindent 10 }}
          {{- if .Values.batch.claim }}
          - {name: batch, mountPath: /batch}
          {{- end }}
    volumes:
      {{- include "manta.volumes" (dict "root" . "shmSize" "2Gi" "cached" false) | nindent 6 }}
      {{- with .Values.batch.claim }}
      - {name: batch, persistentVolumeClaim: {claimName: {{ . }}}}
      {{- end }}
{{- end -}}

{{- define "manta.front" -}}
{{- $spread := dict "podAntiAffinity" (dict "preferredDuringSchedulingIgnoredDuringExecution" (list (dict "weight" 100 "podAffinityTerm" (dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" (include "manta.podLabels" (dict "root" . "role" "front") | fromYaml)))))) -}}
{{- $place := .Values.front -}}
{{- if not $place.affinity -}}{{- $place = merge (dict "affinity" $spread) (omit $place "affinity") -}}{{- end -}}
groupName: front
replicas: {{ .Values.front.replicas }}
minReplicas: {{ .Values.front.replicas }}
maxReplicas: {{ .Values.front.replicas }}
resources:
  manta-front: "1"
rayStartParams:
  object-store-memory: {{ include "manta.objectStore" . }}
  block: "true"
template:
  metadata:
    labels:
      {{- include "manta.podLabels" (dict "root" . "role" "front") | nindent 6 }}
    {{- with .Values.front.podAnnotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    serviceAccountName: {{ include "manta.serviceAccount" . }}
    automountServiceAccountToken: false
    terminationGracePeriodSeconds: {{ include "manta.gracePeriod" . }}
    securityContext:
      {{- include "manta.podSecurity" . | nindent 6 }}
    {{- with include "manta.placement" (dict "root" . "place" $place) }}
    {{- . | trim | nindent 4 }}
    {{- end }}
    containers:
      - name: ray-worker
        image: {{ include "manta.image" . }}
        imagePullPolicy: {{ .Values.image.pullPolicy }}
        securityContext:
          {{- include "manta.containerSecurity" (dict) | nindent 10 }}
        ports:
          - {name: http, containerPort: 8000}
          - {name: grpc, containerPort: 9000}
          - {name: metrics, containerPort: 8080}
        env:
          {{- include "manta.env" . | nindent 10 }}
        resources:
          {{- toYaml .Values.front.resources | nindent 10 }}
        startupProbe:
          httpGet: {path: /api/healthz, port: 52365}
          periodSeconds: 5
          failureThreshold: 60
        {{- /* KubeRay submits a job when every pod is Ready, and it is the job that deploys what /readyz asks for: there KubeRay's own probe of Ray. */}}
        {{- if not .Values.batch.input }}
        readinessProbe:
          httpGet: {path: /readyz, port: 8000}
          periodSeconds: 5
          timeoutSeconds: 5
          failureThreshold: 2
        {{- end }}
        lifecycle:
          {{- include "manta.drain" (dict "root" .) | nindent 10 }}
        volumeMounts:
          {{- include "manta.mounts" . | nindent 10 }}
    volumes:
      {{- include "manta.volumes" (dict "root" . "shmSize" "1Gi" "cached" false) | nindent 6 }}
{{- end -}}

{{/* A worker group (.root, .group). A replica of the group is hostsPerReplica pods, which are created and deleted together. */}}
{{- define "manta.workers" -}}
{{- $values := .root.Values -}}
{{- $group := .group -}}
{{- $min := $group.min | default 0 | int -}}
{{- $served := list -}}
{{- range $values.models -}}{{- $served = append $served .workerGroup -}}{{- end -}}
groupName: {{ $group.name }}
replicas: {{ $min }}
minReplicas: {{ $min }}
maxReplicas: {{ $group.max | default $min | int }}
numOfHosts: {{ $group.hostsPerReplica | default 1 | int }}
{{- if and $values.ray.autoscaler.enabled (hasKey $group "idleTimeoutSeconds") }}
idleTimeoutSeconds: {{ $group.idleTimeoutSeconds }}
{{- end }}
resources:
  {{ printf "manta-%s" $group.name }}: "1"
rayStartParams:
  object-store-memory: {{ include "manta.objectStore" . }}
  block: "true"
template:
  metadata:
    labels:
      {{- include "manta.podLabels" (dict "root" .root "role" "worker") | nindent 6 }}
      manta/worker-group: {{ $group.name }}
    {{- with merge (include "manta.topology" (dict "root" .root "group" $group) | fromYaml) ($group.podAnnotations | default dict) }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    serviceAccountName: {{ include "manta.serviceAccount" .root }}
    automountServiceAccountToken: false
    terminationGracePeriodSeconds: {{ include "manta.gracePeriod" .root }}
    securityContext:
      {{- include "manta.podSecurity" .root | nindent 6 }}
    {{- with $group.runtimeClassName }}
    runtimeClassName: {{ . }}
    {{- end }}
    {{- with include "manta.placement" (dict "root" .root "place" $group) }}
    {{- . | trim | nindent 4 }}
    {{- end }}
    {{- if and (eq $values.cache.download "init") (has $group.name $served) }}
    initContainers:
      - {{- include "manta.download" (dict "root" .root "file" (printf "group-%s.yaml" $group.name)) | nindent 8 }}
    {{- end }}
    containers:
      - name: ray-worker
        image: {{ include "manta.image" .root }}
        imagePullPolicy: {{ $values.image.pullPolicy }}
        securityContext:
          {{- include "manta.containerSecurity" (dict "ipcLock" (dig "rdma" "ipcLock" false $group)) | nindent 10 }}
        ports:
          - {name: http, containerPort: 8000}
          - {name: grpc, containerPort: 9000}
          - {name: metrics, containerPort: 8080}
        env:
          {{- include "manta.env" .root | nindent 10 }}
          {{- range $name, $value := $group.ncclEnv }}
          - {name: {{ $name }}, value: {{ $value | quote }}}
          {{- end }}
          {{- with $group.env }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        resources:
          {{- include "manta.workerResources" $group | nindent 10 }}
        startupProbe:
          httpGet: {path: /api/healthz, port: 52365}
          periodSeconds: 5
          failureThreshold: 120
        lifecycle:
          {{- include "manta.drain" (dict "root" .root "how" "--leave") | nindent 10 }}
        volumeMounts:
          {{- include "manta.mounts" .root | nindent 10 }}
    volumes:
      {{- include "manta.volumes" (dict "root" .root "shmSize" ($group.shmSize | default "16Gi") "cached" true) | nindent 6 }}
{{- end -}}

{{/* Resources of a host: as given, else 4 CPUs and 32 GiB per GPU; plus its GPUs and RDMA devices. */}}
{{- define "manta.workerResources" -}}
{{- $gpus := .gpusPerHost | default 0 | int -}}
{{- $memory := printf "%dGi" (mul 32 (max 1 $gpus)) -}}
{{- $default := dict "requests" (dict "cpu" (toString (mul 4 (max 1 $gpus))) "memory" $memory) "limits" (dict "memory" $memory) -}}
{{- $resources := deepCopy (.resources | default $default) -}}
{{- $devices := dict -}}
{{- if $gpus -}}{{- $_ := set $devices (.gpuResource | default "nvidia.com/gpu") $gpus -}}{{- end -}}
{{- with .rdma -}}{{- if .resource -}}{{- $_ := set $devices .resource (.count | default 1 | int) -}}{{- end -}}{{- end -}}
{{- if $devices -}}
  {{- $_ := set $resources "requests" (merge (deepCopy $devices) ($resources.requests | default dict)) -}}
  {{- $_ := set $resources "limits" (merge $devices ($resources.limits | default dict)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Annotation for Kueue to keep the hosts of a group within one topology domain. */}}
{{- define "manta.topology" -}}
{{- if .root.Values.kueue.queueName -}}
{{- with .group.topology -}}
{{- with .required }}
kueue.x-k8s.io/podset-required-topology: {{ . }}
{{- end }}
{{- with .preferred }}
kueue.x-k8s.io/podset-preferred-topology: {{ . }}
{{- end }}
{{- end -}}
{{- end -}}
{{- end -}}
