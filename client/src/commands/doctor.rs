//! `casemate doctor`: exit code 1 where something is broken.

use serde::Serialize;

use crate::bus::{Failure, connect, manager};
use crate::output::{json, printable, say};

#[derive(Serialize)]
struct Finding {
    check: String,
    severity: String,
    detail: String,
    remedy: String,
}

pub async fn run(as_json: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let findings = manager(&connection).await?.doctor(Default::default()).await?;
    let findings: Vec<Finding> = findings
        .into_iter()
        .map(|(check, severity, detail, remedy)| Finding { check, severity, detail, remedy })
        .collect();
    let broken = findings.iter().any(|finding| finding.severity == "broken");
    if as_json {
        json(&findings)?;
    } else {
        for finding in &findings {
            say!("{:9} {}: {}", finding.severity, printable(&finding.check), printable(&finding.detail));
            if !finding.remedy.is_empty() {
                say!("{:9} → {}", "", printable(&finding.remedy));
            }
        }
    }
    Ok(u8::from(broken))
}
