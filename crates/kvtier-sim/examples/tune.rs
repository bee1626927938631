use kvtier_sim::simulate::*; use kvtier_sim::trace::TraceReader;
fn main(){
 let a:Vec<String>=std::env::args().collect();
 let mut r:Vec<_>=TraceReader::new(std::io::BufReader::new(std::fs::File::open(&a[1]).unwrap())).map(|r|r.unwrap()).collect();
 if a[2]=="half"{r.truncate(6015);}
 let p=Prompts::new(&r,512);
 let caps:Vec<f64>=a[4].split(',').map(|x|x.parse().unwrap()).collect();
 for n in a[3].split(','){ let pol:Policy=n.parse().unwrap(); let t=std::time::Instant::now();
  let v:Vec<f64>=caps.iter().map(|c|simulate(&p,pol,(p.blocks() as f64*c/100.0) as usize,&mut||()).token_ratio()*100.0).collect();
  println!("{:10} {} {:.3} {:.2}s",n,v.iter().map(|x|format!("{x:.2}")).collect::<Vec<_>>().join(" "),v.iter().sum::<f64>()/v.len() as f64,t.elapsed().as_secs_f64());
 }
}
