{{/* The server's settings: `config`, settings from `models`, and settings that running on Kubernetes implies. */}}

{{/* The location of a source inside a pod. */}}
{{- define "manta.place" -}}
{{- if hasPrefix "pvc://" . -}}{{- printf "/claims/%s" (trimPrefix "pvc://" .) -}}{{- else -}}{{- . -}}{{- end -}}
{{- end -}}

{{/* One entry of ServeConfig.models. */}}
{{- define "manta.modelEntry" -}}
{{- $model := .model -}}
{{- $group := dict "gpusPerHost" 0 -}}
{{- range .root.Values.workerGroups -}}
  {{- if eq .name $model.workerGroup -}}{{- $group = . -}}{{- end -}}
{{- end -}}
{{- $gpus := $group.gpusPerHost | default 0 | int -}}
{{- $entry := dict "model" (dict "name" $model.name "source" (include "manta.place" $model.source)) -}}
{{- with $model.revision -}}{{- $_ := set $entry.model "revision" . -}}{{- end -}}
{{- with $model.adapter -}}{{- $_ := set $entry.model "adapter" (include "manta.place" .) -}}{{- end -}}
{{- with $model.adapterRevision -}}{{- $_ := set $entry.model "adapter_revision" . -}}{{- end -}}
{{- with $model.parallel -}}{{- $_ := set $entry "parallel" . -}}{{- end -}}
{{- $_ := set $entry "resources" (dict "gpus" (ternary 1.0 0.0 (gt $gpus 0)) "one_host" (eq (int ($group.hostsPerReplica | default 1)) 1) "host_resource" (printf "manta-%s" $model.workerGroup)) -}}
{{- $_ := set $entry "replicas" (include "manta.replicas" $model | fromYaml) -}}
{{- with $model.autoscaling -}}{{- $_ := set $entry "autoscaling" . -}}{{- end -}}
{{- toYaml (mergeOverwrite $entry (deepCopy ($model.settings | default dict))) -}}
{{- end -}}

{{/* Replicas as in ServeConfig; one replica by default. */}}
{{- define "manta.replicas" -}}
{{- $replicas := .replicas | default dict -}}
{{- $min := ternary ($replicas.min | int) 1 (hasKey $replicas "min") -}}
min: {{ $min }}
max: {{ ternary ($replicas.max | int) (max $min 1) (hasKey $replicas "max") }}
{{- if hasKey $replicas "initial" }}
count: {{ $replicas.initial | int }}
{{- end }}
{{- end -}}

{{/* PEM files of the gRPC port by role. */}}
{{- define "manta.tls" -}}
{{- if .Values.grpc.tls.secretName -}}
certificate: /etc/manta/tls/tls.crt
key: /etc/manta/tls/tls.key
{{- if .Values.grpc.tls.clientCertificates }}
client_ca: /etc/manta/tls/ca.crt
{{- end }}
{{- end -}}
{{- end -}}

{{/* All settings, as a ServeConfig tree. */}}
{{- define "manta.config" -}}
{{- $root := . -}}
{{- $models := list -}}
{{- range .Values.models -}}
  {{- $models = append $models (include "manta.modelEntry" (dict "root" $root "model" .) | fromYaml) -}}
{{- end -}}
{{- $ours := dict
    "models" $models
    "replica" (dict "other_hosts" true "drain_timeout_s" (.Values.longestStreamSeconds | int))
    "fronts" (dict "count" (.Values.front.replicas | int) "host_resource" "manta-front")
    "http" (dict "host" "0.0.0.0" "port" 8000)
    "grpc" (dict "host" "0.0.0.0" "port" 9000 "reflection" .Values.grpc.reflection) -}}
{{- range $role, $file := include "manta.tls" . | fromYaml -}}
  {{- $_ := set $ours.grpc $role $file -}}
{{- end -}}
{{- with .Values.otel.endpoint -}}
  {{- $_ := set $ours "tracing" (dict "otlp_endpoint" (printf "%s/v1/traces" (trimSuffix "/" .)) "ratio" $.Values.otel.sampleRatio) -}}
{{- end -}}
{{- with .Values.auth.keys.secretName -}}
  {{- $_ := set $ours "auth" (dict "keys_file" (printf "/etc/manta/keys/%s" $.Values.auth.keys.secretKey)) -}}
{{- end -}}
{{- toYaml (mergeOverwrite $ours (deepCopy .Values.config)) -}}
{{- end -}}

{{/* The same with the models of one group only: a host need not download models that other groups serve. */}}
{{- define "manta.groupConfig" -}}
{{- $config := include "manta.config" .root | fromYaml -}}
{{- $models := list -}}
{{- range $index, $model := .root.Values.models -}}
  {{- if eq $model.workerGroup $.group -}}{{- $models = append $models (index $config.models $index) -}}{{- end -}}
{{- end -}}
{{- toYaml (set $config "models" $models) -}}
{{- end -}}

{{/* The Ray Serve config file: proxy settings are outside the application, all others are its args. */}}
{{- define "manta.serveConfig" -}}
{{- $config := include "manta.config" . | fromYaml -}}
{{- $args := deepCopy $config -}}
{{- $_ := set $args "http" (omit $config.http "host" "port") -}}
{{- $_ := set $args "grpc" (omit $config.grpc "host" "port" "reflection" "certificate" "key" "client_ca") -}}
{{- range list "http" "grpc" -}}{{- if not (get $args .) -}}{{- $_ := unset $args . -}}{{- end -}}{{- end -}}
proxy_location: EveryNode
http_options: {host: {{ $config.http.host }}, port: {{ $config.http.port | int }}}
grpc_options:
  port: {{ $config.grpc.port | int }}
  grpc_servicer_functions:
    {{- include "manta.servicers" . | nindent 4 }}
  enable_reflection: {{ $config.grpc.reflection }}
logging_config: {log_level: {{ dig "logging" "level" "info" $config | upper }}, enable_access_log: false}
applications:
  - name: manta
    route_prefix: /
    import_path: serve.app:app
    args:
      {{- toYaml $args | nindent 6 }}
{{- end -}}

{{- define "manta.servicers" -}}
- serve.grpc.generated.service_pb2_grpc.add_MantaServiceServicer_to_server
- serve.grpc.generated.admin_pb2_grpc.add_AdminServiceServicer_to_server
- grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server
{{- end -}}
