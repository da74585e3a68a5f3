{{/* Common parts of all pods: security context, environment, volumes. */}}

{{- define "manta.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "manta.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
  {{- if .ipcLock }}
  add: [IPC_LOCK]
  {{- end }}
{{- end -}}

{{/* The proxies bind gRPC to the pod's own address; see serve/proxy_hook.py. */}}
{{- define "manta.env" -}}
- name: MANTA_PROXY_GRPC_HOST
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- range $role, $file := include "manta.tls" . | fromYaml }}
- {name: MANTA_PROXY_GRPC_{{ upper $role }}, value: {{ $file }}}
{{- end }}
{{- with dig "http" "slow_client_timeout_s" "" .Values.config }}
- {name: MANTA_PROXY_SLOW_CLIENT_TIMEOUT_S, value: {{ . | toString | quote }}}
{{- end }}
- {name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, value: serve.proxy_hook.before_listening}
- {name: RAY_SERVE_GRPC_MAX_MESSAGE_SIZE, value: "67108864"}
- {name: RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S, value: "1"}
- {name: SERVE_SOCKET_REUSE_PORT_ENABLED, value: "0"}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_worker_niceness, value: "0"}
- {name: HOME, value: /tmp}
- {name: HF_HOME, value: /models/huggingface}
- {name: MODELSCOPE_CACHE, value: /models/modelscope}
- {name: MANTA_CACHE, value: /models/manta}
- {name: XDG_CACHE_HOME, value: /models/cache}
- {name: TRITON_CACHE_DIR, value: /models/triton}
{{- if .Values.huggingface.token }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      {{- include "manta.secretKeyRef" (dict "root" . "value" .Values.huggingface.token "key" "huggingface-token") | nindent 6 }}
{{- end }}
{{- if .Values.otel.endpoint }}
- {name: OTEL_SERVICE_NAME, value: {{ include "manta.fullname" $ }}}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "manta.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
- {name: models, mountPath: /models}
- {name: config, mountPath: /etc/manta/config, readOnly: true}
{{- if .Values.grpc.tls.secretName }}
- {name: tls, mountPath: /etc/manta/tls, readOnly: true}
{{- end }}
{{- if .Values.auth.keys.secretName }}
- {name: keys, mountPath: /etc/manta/keys, readOnly: true}
{{- end }}
{{- range include "manta.modelClaims" . | fromYamlArray }}
- {name: claim-{{ . }}, mountPath: /claims/{{ . }}, readOnly: true}
{{- end }}
{{- end -}}

{{/* .root, .shmSize, and .cached: whether the pod reads weights. */}}
{{- define "manta.volumes" -}}
{{- $values := .root.Values -}}
- {name: tmp, emptyDir: {}}
- {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .shmSize }}}}
{{- if or (eq $values.cache.type "emptyDir") (not .cached) }}
- {name: models, emptyDir: {sizeLimit: {{ ternary $values.cache.size "10Gi" .cached }}}}
{{- else if eq $values.cache.type "pvc" }}
- {name: models, persistentVolumeClaim: {claimName: {{ include "manta.claim" .root }}}}
{{- else }}
- {name: models, hostPath: {path: {{ $values.cache.hostPath }}, type: DirectoryOrCreate}}
{{- end }}
- {name: config, configMap: {name: {{ include "manta.fullname" .root }}}}
{{- with $values.grpc.tls.secretName }}
- {name: tls, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- with $values.auth.keys.secretName }}
- {name: keys, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- range include "manta.modelClaims" .root | fromYamlArray }}
- {name: claim-{{ . }}, persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}}
{{- end }}
{{- end -}}

{{/* PersistentVolumeClaims that hold models and adapters: those in pvc:// sources. */}}
{{- define "manta.modelClaims" -}}
{{- $claims := list -}}
{{- range .Values.models -}}
  {{- range compact (list .source .adapter) -}}
    {{- if hasPrefix "pvc://" . -}}{{- $claims = append $claims (index (splitList "/" (trimPrefix "pvc://" .)) 0) -}}{{- end -}}
  {{- end -}}
{{- end -}}
{{- uniq $claims | toYaml -}}
{{- end -}}

{{/* Node selection of a pod; .place: the values of head, front or a worker group. */}}
{{- define "manta.placement" -}}
{{- with .place.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Grace period: the longest stream, plus the time that Ray Serve takes to stop replicas. */}}
{{- define "manta.gracePeriod" -}}
{{- add .Values.longestStreamSeconds 60 -}}
{{- end -}}

{{/* preStop hook: before Ray gets SIGTERM, let clients move elsewhere and streams end. .how: option of k8s/images/drain. */}}
{{- define "manta.drain" -}}
preStop:
  exec:
    command: [/opt/manta/k8s/images/drain, {{ .root.Values.longestStreamSeconds | quote }}{{ with .how }}, {{ . }}{{ end }}]
{{- end -}}

{{/* Download and check the models in the settings file .file (manta.yaml: all models; a group's file: models of its hosts). */}}
{{- define "manta.download" -}}
name: download
image: {{ include "manta.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
command: [manta, doctor, --config, /etc/manta/config/{{ .file }}, --checkpoint-only]
env:
  {{- include "manta.env" .root | nindent 2 }}
resources:
  {{- toYaml .root.Values.cache.resources | nindent 2 }}
securityContext:
  {{- include "manta.containerSecurity" (dict) | nindent 2 }}
volumeMounts:
  {{- include "manta.mounts" .root | nindent 2 }}
{{- end -}}
