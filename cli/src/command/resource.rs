//! `ovlctl apply`, `get`, `describe`, `delete` and `diff`: Kubernetes' objects, with kubectl's words.

mod describe;
mod diff;
mod files;
mod table;

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ovl_control::{
    Action, Applied, AppliedAll, Apply, Client, Document, Reply, Request, ResourceInfo, ResourceQuery,
    ServiceBackends,
};
use ovl_manifest::yaml::to_yaml;
use ovl_proto::resource::{DEFAULT_NAMESPACE, Kind, Name, ResourceKey};
use serde_json::{Value, json};

use crate::args::Output;
use crate::context::{Context, write_out};
use crate::error::{Error, Result};
use crate::text::printable_lines;

/// Ten thousand objects take some seconds to write and to sign.
const PATIENCE: u64 = 120;
/// Bytes of documents in one request: half of what one may have.
const PART: usize = 512 << 10;

/// Where manifests are.
#[derive(Debug, clap::Args)]
pub(crate) struct Files {
    /// A file, a folder of files, or `-` for standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// The namespace of objects that name none [default: default]
    #[arg(short, long, value_name = "NS")]
    namespace: Option<String>,
    /// Look into folders within folders too
    #[arg(short = 'R', long)]
    recursive: bool,
}

/// Arguments of `apply`.
#[derive(Debug, clap::Args)]
pub(crate) struct ApplyArgs {
    #[command(flatten)]
    files: Files,
    /// Check everything, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Warn of fields that are not supported, instead of refusing them
    #[arg(long)]
    lenient: bool,
}

/// Arguments of `diff`.
#[derive(Debug, clap::Args)]
pub(crate) struct DiffArgs {
    #[command(flatten)]
    files: Files,
    /// Warn of fields that are not supported, instead of refusing them
    #[arg(long)]
    lenient: bool,
}

/// Arguments of `get` and `describe`.
#[derive(Debug, clap::Args)]
pub(crate) struct GetArgs {
    /// Such as `svc`, `pods`, `netpol`, `ns`, `endpointslices`, `ep`; several with commas; KIND/NAME
    kind: String,
    /// Only this one
    name: Option<String>,
    /// Only in this namespace [default: default]
    #[arg(short, long, value_name = "NS", conflicts_with = "all_namespaces")]
    namespace: Option<String>,
    /// In all namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
}

/// Arguments of `delete`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").args(["kind", "files"]).required(true))]
pub(crate) struct DeleteArgs {
    /// Such as `svc`, `pod`, `netpol`, `ns`, `endpointslice`; or KIND/NAME
    kind: Option<String>,
    /// The objects' names
    names: Vec<String>,
    /// Those of a file, a folder of files, or `-` for standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE", conflicts_with = "kind")]
    files: Vec<PathBuf>,
    /// The namespace [default: default]
    #[arg(short, long, value_name = "NS")]
    namespace: Option<String>,
    /// Look into folders within folders too
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Say what would be deleted
    #[arg(long)]
    dry_run: bool,
}

/// `ovlctl apply`
pub(crate) fn apply(context: &Context, args: &ApplyArgs) -> Result<()> {
    let all = send(context, &args.files, args.dry_run, args.lenient, false)?;
    context.print(&all.objects, |objects| outcome(objects, args.dry_run))
}

/// `ovlctl diff`; exit status 1 where there are differences, as kubectl has it.
pub(crate) fn diff(context: &Context, args: &DiffArgs) -> Result<ExitCode> {
    let all = send(context, &args.files, true, args.lenient, true)?;
    let changed = all.objects.iter().any(|object| object.action != Action::Unchanged);
    context.print(&all.objects, |objects| objects.iter().map(diff::of_object).collect())?;
    Ok(if changed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn send(context: &Context, files: &Files, dry_run: bool, lenient: bool, show: bool) -> Result<AppliedAll> {
    let documents = files::read(&files.files, files.recursive)?;
    if documents.is_empty() {
        return Err(Error::Failed("there is no object in what was given".to_owned()));
    }
    let apply = Apply { namespace: files.namespace.clone(), dry_run, lenient, show };
    let all = answer(context, documents, &Request::Apply(apply))?;
    for warning in &all.warnings {
        let _ = writeln!(io::stderr(), "ovlctl: warning: {}", printable_lines(&warning.to_string()));
    }
    Ok(all)
}

/// Stages documents, and asks what is to become of them on the same connection.
fn answer(context: &Context, documents: Vec<Document>, request: &Request) -> Result<AppliedAll> {
    let no_reply = |error| Error::no_reply(error, PATIENCE);
    let mut client =
        Client::connect(&context.socket, Some(Duration::from_secs(PATIENCE))).map_err(no_reply)?;
    for documents in parts(documents) {
        match client.request(&Request::Stage { documents }).map_err(no_reply)? {
            Reply::Done => {}
            _ => return Err(Error::unexpected_reply()),
        }
    }
    match client.request(request).map_err(no_reply)? {
        Reply::Applied(all) => Ok(*all),
        Reply::Refused(problems) => {
            let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
            let all = if let [one] = lines.as_slice() {
                one.clone()
            } else {
                format!("\n  {}", lines.join("\n  "))
            };
            Err(Error::Failed(format!("nothing was changed: {all}")))
        }
        _ => Err(Error::unexpected_reply()),
    }
}

/// Cuts documents into requests.
fn parts(documents: Vec<Document>) -> Vec<Vec<Document>> {
    let mut parts: Vec<Vec<Document>> = Vec::new();
    let mut bytes = PART;
    for document in documents {
        let length = document.value.to_string().len() + document.file.len() + 64;
        bytes += length;
        match parts.last_mut().filter(|_| bytes <= PART) {
            Some(part) => part.push(document),
            None => {
                bytes = length;
                parts.push(vec![document]);
            }
        }
    }
    parts
}

/// As kubectl says it.
fn outcome(objects: &[Applied], dry_run: bool) -> String {
    let dry = if dry_run { " (dry run)" } else { "" };
    let line = |it: &Applied| {
        let kind = it.kind.qualified();
        match it.action {
            Action::Deleted => format!("{kind} \"{}\" deleted{dry}\n", it.name),
            Action::Absent => format!("{kind} \"{}\" is not there\n", it.name),
            Action::Created | Action::Configured | Action::Unchanged => {
                format!("{kind}/{} {}{dry}\n", it.name, it.action)
            }
        }
    };
    objects.iter().map(line).map(|line| printable_lines(&line) + "\n").collect()
}

/// `ovlctl delete`
pub(crate) fn delete(context: &Context, args: &DeleteArgs) -> Result<()> {
    let documents =
        if args.files.is_empty() { Vec::new() } else { files::read(&args.files, args.recursive)? };
    let keys = args.keys()?;
    if keys.is_empty() && documents.is_empty() {
        return Err(Error::Usage("nothing to delete: name a kind and objects, or a file with -f".to_owned()));
    }
    let request = Request::Delete { keys, namespace: args.namespace.clone(), dry_run: args.dry_run };
    let all = answer(context, documents, &request)?;
    context.print(&all.objects, |objects| outcome(objects, args.dry_run))
}

impl DeleteArgs {
    fn keys(&self) -> Result<Vec<ResourceKey>> {
        let Some(kind) = &self.kind else { return Ok(Vec::new()) };
        let pairs: Vec<(Kind, String)> = match kind.split_once('/') {
            Some(_) => {
                std::iter::once(kind).chain(&self.names).map(|text| slashed(text)).collect::<Result<_>>()?
            }
            None => {
                let kind = kind_of(kind)?;
                self.names.iter().map(|name| (kind, name.clone())).collect()
            }
        };
        let namespace = self.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
        let key = |(kind, name): (Kind, String)| {
            let namespace = if kind.is_namespaced() { namespace } else { "" };
            ResourceKey { kind, name: Name::new(namespace, name) }
        };
        Ok(pairs.into_iter().map(key).collect())
    }
}

fn slashed(text: &str) -> Result<(Kind, String)> {
    match text.split_once('/') {
        Some((kind, name)) if !name.is_empty() => Ok((kind_of(kind)?, name.to_owned())),
        _ => Err(Error::Usage(format!("'{text}' is not KIND/NAME"))),
    }
}

fn kind_of(text: &str) -> Result<Kind> {
    let lower = text.to_ascii_lowercase();
    Kind::ALL.into_iter().find(|kind| kind.spellings().contains(&lower.as_str())).ok_or_else(|| {
        let all: Vec<&str> = Kind::ALL.iter().filter_map(|kind| kind.spellings().get(1).copied()).collect();
        Error::Usage(format!("there is no kind '{text}': use {}, or endpoints", all.join(", ")))
    })
}

/// What `get` shows: objects of a kind, or what stands behind Services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    Objects(Kind),
    Endpoints,
}

impl Shown {
    fn parse(text: &str) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for word in text.split(',') {
            match word.to_ascii_lowercase().as_str() {
                "all" => all.extend(
                    [Kind::Pod, Kind::Service, Kind::EndpointSlice, Kind::NetworkPolicy].map(Self::Objects),
                ),
                "ep" | "endpoint" | "endpoints" => all.push(Self::Endpoints),
                _ => all.push(Self::Objects(kind_of(word)?)),
            }
        }
        Ok(all)
    }
}

/// One kind's objects.
enum Found {
    Objects(Kind, Vec<ResourceInfo>),
    Endpoints(Vec<ServiceBackends>),
}

impl Found {
    fn is_empty(&self) -> bool {
        match self {
            Self::Objects(_, objects) => objects.is_empty(),
            Self::Endpoints(services) => services.is_empty(),
        }
    }
}

impl GetArgs {
    fn find(&self, context: &Context) -> Result<Vec<Found>> {
        let (kinds, name) = match self.kind.split_once('/') {
            Some((kind, name)) if self.name.is_none() => (kind, Some(name.to_owned())),
            _ => (self.kind.as_str(), self.name.clone()),
        };
        let namespace = match (self.all_namespaces, &self.namespace) {
            (true, _) => None,
            (false, namespace) => Some(namespace.clone().unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned())),
        };
        let mut all = Vec::new();
        for shown in Shown::parse(kinds)? {
            let query = |kind| ResourceQuery { kind, namespace: namespace.clone(), name: name.clone() };
            let found = match shown {
                Shown::Objects(kind) => match context.ask(&Request::Get(query(kind)))? {
                    Reply::Resources(objects) => Found::Objects(kind, objects),
                    _ => return Err(Error::unexpected_reply()),
                },
                Shown::Endpoints => Found::Endpoints(ask_backends(context, query(Kind::Service))?),
            };
            if let Some(name) = name.as_ref().filter(|_| found.is_empty()) {
                let kind = match shown {
                    Shown::Objects(kind) => kind.qualified(),
                    Shown::Endpoints => "endpoints",
                };
                let place = namespace.as_ref().map(|it| format!(" in namespace {it}")).unwrap_or_default();
                return Err(Error::Failed(format!("there is no {kind} \"{name}\"{place}")));
            }
            all.push(found);
        }
        Ok(all)
    }
}

fn ask_backends(context: &Context, query: ResourceQuery) -> Result<Vec<ServiceBackends>> {
    match context.ask(&Request::Backends(query))? {
        Reply::Backends(services) => Ok(services),
        _ => Err(Error::unexpected_reply()),
    }
}

/// `ovlctl get`
pub(crate) fn get(context: &Context, args: &GetArgs) -> Result<()> {
    let found = args.find(context)?;
    let text = match context.output {
        Output::Table | Output::Wide => {
            let show = table::Show { namespaces: args.all_namespaces, wide: context.output == Output::Wide };
            let tables: Vec<String> =
                found.iter().filter(|it| !it.is_empty()).map(|it| table::render(it, show)).collect();
            if tables.is_empty() {
                let place = match (&args.namespace, args.all_namespaces) {
                    (_, true) => String::new(),
                    (namespace, false) => {
                        format!(" in {} namespace", namespace.as_deref().unwrap_or("default"))
                    }
                };
                context.say(&format!("No resources found{place}."));
            }
            tables.join("\n")
        }
        Output::Json => pretty(&manifests(&found, args))? + "\n",
        Output::Yaml => to_yaml(&manifests(&found, args)),
    };
    write_out(&text).map(drop)
}

fn pretty(value: &Value) -> Result<String> {
    serde_json::to_string_pretty(value)
        .map_err(|error| Error::Failed(format!("cannot write the answer: {error}")))
}

/// As kubectl has it: one object where one was named, else a list that can be applied again.
fn manifests(found: &[Found], args: &GetArgs) -> Value {
    let each = found.iter().flat_map(|found| match found {
        Found::Objects(_, objects) => {
            objects.iter().map(|object| object.manifest.clone()).collect::<Vec<_>>()
        }
        Found::Endpoints(services) => services.iter().map(|service| json!(service)).collect(),
    });
    let mut all: Vec<Value> = each.collect();
    let named = args.name.is_some() || args.kind.contains('/');
    match all.pop() {
        Some(one) if named && all.is_empty() => one,
        last => {
            all.extend(last);
            json!({ "apiVersion": "v1", "kind": "List", "items": all })
        }
    }
}

/// `ovlctl describe`
pub(crate) fn describe(context: &Context, args: &GetArgs) -> Result<()> {
    let mut texts = Vec::new();
    for found in args.find(context)? {
        match found {
            Found::Objects(kind, objects) => {
                for object in objects {
                    let backends = if kind == Kind::Service {
                        let namespace = Some(object.namespace.clone());
                        let query = ResourceQuery { kind, namespace, name: Some(object.name.clone()) };
                        ask_backends(context, query)?.into_iter().next()
                    } else {
                        None
                    };
                    texts.push(describe::object(&object, backends.as_ref()));
                }
            }
            Found::Endpoints(services) => texts.extend(services.iter().map(describe::backends)),
        }
    }
    write_out(&texts.join("\n\n")).map(drop)
}

#[cfg(test)]
mod tests;
