//! `ovlctl recover`: continues a cluster whose majority is lost for good, or answers such a recovery of other hosts.

use std::io::{self, BufRead, IsTerminal, Write};

use ovl_control::{RecoverStep, RecoveryInfo, RecoveryMember, RecoveryPlan, RecoveryState, Reply, Request};
use ovl_proto::clock::timestamp;

use crate::args::Output;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{TextTable, optional, plural, prefixed_lines, printable_lines};

/// Arguments of `recover`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true)))]
pub(crate) struct Args {
    /// Make this host, and the other members that are alive, the members of a new cluster: the majority is lost for good
    #[arg(long, group = "what")]
    from_majority_loss: bool,
    /// Join the cluster that other hosts recovered without this one
    #[arg(long, group = "what")]
    accept: bool,
    /// Go on in spite of a recovery by other hosts, because the majority was not lost
    #[arg(long, group = "what")]
    reject: bool,
    /// With --from-majority-loss: show what would be done, and change nothing
    #[arg(long, conflicts_with_all = ["accept", "reject"])]
    dry_run: bool,
    /// Answer the first question with yes
    #[arg(long)]
    yes: bool,
    /// With --from-majority-loss: answer the second question, which is how many hosts are lost
    #[arg(long, value_name = "COUNT", conflicts_with_all = ["accept", "reject"])]
    lost: Option<usize>,
}

/// Recovers the cluster, or accepts or rejects a recovery.
pub(crate) fn run(context: &Context, args: &Args) -> Result<()> {
    if args.accept || args.reject {
        return answer(context, args);
    }
    let plan = request(context, RecoverStep::Plan)?;
    match plan.state {
        _ if args.dry_run => return context.print(&plan, render),
        RecoveryState::Recovered => {
            context.note("Nothing to do: a majority of the members of the recovered cluster is alive.");
            return context.print(&plan, render);
        }
        RecoveryState::Refused | RecoveryState::LeftOut => {
            return Err(Error::Failed(plan.refused.unwrap_or_default()));
        }
        RecoveryState::Possible => {}
    }
    if context.output == Output::Table || !args.yes || args.lost.is_none() {
        say(&render(&plan))?;
    }
    let lost = plan.members.iter().filter(|member| !member.survives).count();
    confirm(args.yes, "Are these hosts lost for good, and off?")?;
    let count = match args.lost {
        Some(count) => Some(count),
        None => {
            let hosts = plural(lost as u64, "host");
            let question = format!(
                "The {hosts} above that are given up cannot return by themselves. Type their number to go on: "
            );
            ask(&question, io::stdin().is_terminal())?.parse().ok()
        }
    };
    if count != Some(lost) {
        return Err(Error::Failed(format!(
            "nothing was changed: {} would be given up, which is not the number that was given",
            plural(lost as u64, "host")
        )));
    }
    let survivors = plan.members.iter().filter(|member| member.survives).map(|member| member.id).collect();
    let done = request(context, RecoverStep::Confirm { version: plan.version, survivors })?;
    context.note(
        "The cluster is recovered. Its members are those below. Run three hosts or more again soon: \
         a new host joins with --join.",
    );
    context.print(&done, render)
}

/// Accepts or rejects a recovery of other hosts.
fn answer(context: &Context, args: &Args) -> Result<()> {
    let plan = request(context, RecoverStep::Plan)?;
    let Some(left_out) = &plan.left_out else {
        // The daemon says what is wrong.
        let step = if args.accept { RecoverStep::Accept } else { RecoverStep::Reject };
        return request(context, step).map(drop);
    };
    let (step, meaning) = if args.accept {
        (
            RecoverStep::Accept,
            "This host gives up the cluster of before. Endpoints here whose addresses other hosts got since are cut off.",
        )
    } else {
        (
            RecoverStep::Reject,
            "This host goes on in the cluster of before. There will be two clusters, which may hand out the same addresses, \
             until the recovered hosts are started anew.",
        )
    };
    if !args.yes {
        say(&format!("{}{meaning}\n", recovery("Recovered without this host", left_out)))?;
    }
    confirm(args.yes, "Go on?")?;
    let done = request(context, step)?;
    if args.accept {
        context.note(
            "Now run `ovlctl peers admit` with the id of this host on a member: `ovlctl status` shows it.",
        );
    }
    context.print(&done, render)
}

fn request(context: &Context, step: RecoverStep) -> Result<RecoveryPlan> {
    match context.request(&Request::Recover(step))? {
        Reply::Recovery(plan) => Ok(*plan),
        _ => Err(Error::unexpected_reply()),
    }
}

/// Writes to standard error, beside questions.
fn say(text: &str) -> Result<()> {
    io::stderr()
        .write_all(format!("{}\n", printable_lines(text)).as_bytes())
        .map_err(|error| Error::output(&error))
}

/// Asks at a terminal whether to go on, unless `yes` answers it.
fn confirm(yes: bool, question: &str) -> Result<()> {
    if yes
        || matches!(
            ask(&format!("{question} [y/N] "), io::stdin().is_terminal())?.as_str(),
            "y" | "Y" | "yes"
        )
    {
        return Ok(());
    }
    Err(Error::Failed("nothing was changed".to_owned()))
}

/// Asks at a terminal.
fn ask(question: &str, terminal: bool) -> Result<String> {
    if !terminal {
        return Err(Error::Usage(
            "there is no terminal to confirm at. Look at `ovlctl recover --from-majority-loss --dry-run`, and confirm with \
             `--yes`, and with `--lost COUNT` for a recovery"
                .to_owned(),
        ));
    }
    let mut stderr = io::stderr();
    let asked = stderr.write_all(question.as_bytes()).and_then(|()| stderr.flush());
    asked.map_err(|error| Error::output(&error))?;
    let mut line = String::new();
    io::stdin()
        .lock()
        .read_line(&mut line)
        .map_err(|error| Error::Failed(format!("cannot read the answer: {error}. Nothing was changed")))?;
    Ok(line.trim().to_owned())
}

fn recovery(what: &str, info: &RecoveryInfo) -> String {
    format!("{what} at {} on {}; survivors: {}\n", timestamp(info.at_ms), info.by, info.survivors.join(", "))
}

fn render(plan: &RecoveryPlan) -> String {
    let members = || plan.members.iter();
    let fate = |member: &RecoveryMember| match (plan.state, member.survives) {
        (RecoveryState::Possible, true) => "survives",
        (RecoveryState::Possible, false) => "given up",
        _ => "",
    };
    let table = TextTable::new()
        .column("MEMBER", members().map(|each| format!("{}{}", each.name, if each.own { " *" } else { "" })))
        .column("STATE", members().map(|each| each.state))
        .optional_column("AFTERWARDS", "", members().map(fate))
        .column("LAST-ALIVE", members().map(|each| optional(each.last_alive_ms.map(timestamp))))
        .column("BLOCKS", members().map(|each| each.blocks))
        .column("ENDPOINTS", members().map(|each| each.endpoints))
        .render();
    let alive = plan.members.iter().filter(|member| member.survives).count();
    let mut text = format!(
        "{table}\n{alive} of {} members alive, {} needed for a majority\n",
        plan.members.len(),
        plan.needed
    );
    if let Some(last) = &plan.last {
        text += &recovery("This cluster was recovered", last);
    }
    if let Some(left_out) = &plan.left_out {
        text += &recovery("Recovered without this host", left_out);
    }
    match (&plan.refused, plan.state) {
        (Some(why), RecoveryState::Refused | RecoveryState::LeftOut) => {
            text += &format!("There can be no recovery: {why}.\n");
        }
        _ if !plan.costs.is_empty() => {
            text += "\nWhat it may cost:\n";
            text += &prefixed_lines("* ", &plan.costs);
        }
        _ => {}
    }
    text
}

#[cfg(test)]
mod tests {
    use ovl_control::PeerState;

    use super::*;

    fn plan() -> RecoveryPlan {
        let member = |number: u8, own: bool| RecoveryMember {
            name: format!("host{number}"),
            id: "0410c3g8kt7o2s00".parse().unwrap(),
            state: if own { PeerState::Alive } else { PeerState::Dead },
            survives: own,
            last_alive_ms: (!own).then_some(1_700_000_000_000),
            blocks: 2,
            endpoints: 3,
            own,
        };
        RecoveryPlan {
            state: RecoveryState::Possible,
            version: 7,
            needed: 2,
            members: vec![member(1, true), member(2, false), member(3, false)],
            refused: None,
            costs: vec!["It costs".to_owned()],
            last: None,
            left_out: None,
        }
    }

    #[test]
    fn plan_shows_who_survives_and_what_it_costs() {
        assert_eq!(
            render(&plan()),
            "\
MEMBER   STATE  AFTERWARDS  LAST-ALIVE                BLOCKS  ENDPOINTS
host1 *  alive  survives    -                         2       3
host2    dead   given up    2023-11-14T22:13:20.000Z  2       3
host3    dead   given up    2023-11-14T22:13:20.000Z  2       3

1 of 3 members alive, 2 needed for a majority

What it may cost:
* It costs
"
        );
        let refused = RecoveryPlan {
            state: RecoveryState::Refused,
            refused: Some("because".to_owned()),
            costs: Vec::new(),
            ..plan()
        };
        let text = render(&refused);
        assert!(
            text.ends_with("There can be no recovery: because.\n") && !text.contains("survives"),
            "{text}"
        );
    }

    #[test]
    fn nothing_is_asked_without_a_terminal() {
        assert!(matches!(ask("sure? ", false), Err(Error::Usage(_))));
    }
}
